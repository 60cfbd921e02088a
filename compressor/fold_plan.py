"""Where factors per channel move between operations, and which dense tensors a plan rewrites."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.folds import Found, find_folds
from compressor.errors import RecipeError
from compressor.methods.base import Method, RouterMethod
from compressor.methods.scaling import moves_factors
from compressor.plan import OUTSIDE, Fold, FoldKind, Kind, LayerPlan


def plan_folds(method: Method, layers: list[LayerPlan], blocks: BlockSequence, has_kv_cache: bool) -> Found:
    """Find where a method may move factors per channel between operations; nowhere for methods that do not.

    Values that are cached in few bits keep their scale: it is measured before factors are chosen.
    """
    if not moves_factors(method):
        return Found((), {})
    kinds = [kind for kind in method.folds if not (has_kv_cache and kind is FoldKind.VALUE)]
    found = find_folds(blocks, layers, kinds)
    if rounds_routers(method):  # whatever factors a router takes up, it is rounded behind them
        routers = {layer.ref.name for layer in layers if layer.ref.kind is Kind.ROUTER and layer.ref.shape[0] > 1}
        exact = {fold.name for fold in found.folds if fold.dense and not fold.bias and set(fold.dense) <= routers}
        folds = (replace(fold, powers_of_two=False) if fold.name in exact else fold for fold in found.folds)
        found = replace(found, folds=tuple(folds))
    if getattr(method, "shifts", False):
        return found
    return replace(found, folds=tuple(replace(fold, shifted=()) for fold in found.folds))


def rounds_routers(method: Method) -> bool:
    """Return whether a method rounds the weights of routers, which stay dense."""
    return isinstance(method, RouterMethod) and method.router_bits > 0


def mark_rewritten(layers: list[LayerPlan], folds: tuple[Fold, ...], routers: bool) -> list[LayerPlan]:
    """Return the layers with the dense tensors that change marked as such.

    Args:
        layers: The fate of every tensor.
        folds: What divides and multiplies them.
        routers: Whether routers are rounded.
    """
    reasons = {
        name: f"divided per channel by factors that move into {', '.join(reader_names(fold))}"
        for fold in folds
        for name in (fold.scaled, fold.bias)
    }
    reasons |= {name: "multiplied per channel by factors of the norm before it" for f in folds for name in f.dense}
    if routers:
        rounded = [layer.ref.name for layer in layers if layer.ref.kind is Kind.ROUTER and layer.ref.shape[0] > 1]
        reasons |= dict.fromkeys(rounded, "a router, rounded so that it keeps its choices")
    reasons |= {name: "takes up a shift of its layer's inputs" for fold in folds for name in fold.shifted}
    return [
        replace(layer, rewritten_because=reasons[layer.ref.name])
        if layer.ref.name in reasons and not layer.format
        else layer
        for layer in layers
    ]


def mark_statistics(layers: list[LayerPlan], how: str) -> list[LayerPlan]:
    """Return the layers with the running statistics of batch normalization inside the blocks marked as rewritten.

    Raises:
        RecipeError: There are none.
    """
    leaves = ("running_mean", "running_var")
    chosen = {
        layer.ref.name
        for layer in layers
        if layer.ref.block != OUTSIDE and layer.ref.param.rpartition(".")[2] in leaves and not layer.format
    }
    if not chosen:
        raise RecipeError(f"--batch-norm {how}: the blocks have no batch normalization", "leave it out")
    reason = {"correct": "corrected for", "reestimate": "computed from calibration images behind"}[how]
    return [
        replace(layer, rewritten_because=f"{reason} rounded layers") if layer.ref.name in chosen else layer
        for layer in layers
    ]


def reader_names(fold: Fold) -> list[str]:
    """Return the last names of a fold's readers."""
    return list(dict.fromkeys(reader.removesuffix(".weight").rpartition(".")[2] for reader in fold.readers))


def unfolded_notes(method: Method, found: Found) -> tuple[str, ...]:
    """Say for which layers a method finds no place for its factors; equal reasons make one sentence."""
    groups: dict[tuple[str, str], int] = Counter(
        (name.removesuffix(".weight").rpartition(".")[2], reason) for name, reason in found.unfolded.items()
    )
    return tuple(f"{method.name} does not scale {count} {name}: {reason}" for (name, reason), count in groups.items())
