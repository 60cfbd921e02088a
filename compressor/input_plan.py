"""Which layers' inputs are rounded, to what, and what that asks of weights; the planner's part for inputs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import replace

import torch

from compressor.checkpoint.folds import Found
from compressor.errors import RecipeError, UnsupportedError
from compressor.formats.activations import InputFormat, get_input_format
from compressor.inputs import stored_slots
from compressor.methods.base import Method
from compressor.methods.rounding import InputMethod, InputSite
from compressor.plan import OUTSIDE, Kind, LayerPlan
from compressor.recipe import Recipe


def with_inputs(recipe: Recipe, method: Method) -> Recipe:
    """Return the recipe with the format of inputs that its method settles on.

    Raises:
        RecipeError: The method cannot work with the format asked for.
    """
    if not isinstance(method, InputMethod):
        return recipe
    return recipe.model_copy(update={"inputs": method.input_format(recipe.inputs, recipe.format)})


def stored_as(name: str, group_size: str | None, inputs: str | None) -> tuple[str, str | None]:
    """Return the format in which weights are stored, and its group size, when inputs are rounded as well.

    Kernels that multiply integers by integers of as many bits need one scale per channel or matrix; for 8 bits they
    read one code per byte.
    """
    alike = inputs is not None and name in (inputs.partition("-")[0], inputs.partition("-")[0] + "-asym")
    if not alike or not name.startswith("int"):
        return name, group_size
    group_size = group_size or "channel"
    return ("int8-bytes" if name == "int8" and group_size in ("channel", "tensor") else name), group_size


def plan_inputs(
    recipe: Recipe, layers: list[LayerPlan], dtype: torch.dtype, method: Method, found: Found
) -> list[LayerPlan]:
    """Give the inputs of every compressed layer the recipe's format, or what the method makes of it, or a reason.

    Args:
        recipe: With the method's own choice of inputs.
        layers: Weights already planned.
        dtype: Dtype static scales are stored in.
        method: The method.
        found: Where it may move factors.

    Raises:
        RecipeError: A pattern of `--skip-inputs` matches no compressed layer, or a layer has no exponent to take over.
        UnsupportedError: No layer's inputs can be rounded, or a width does not divide into the format's groups.
    """
    if recipe.inputs is None:
        if recipe.skip_inputs:
            raise RecipeError("--skip-inputs says nothing without --inputs", "add --inputs int8-token, for example")
        return layers
    fmt = get_input_format(recipe.inputs)
    compressed = [layer.ref for layer in layers if layer.format]
    skipped: dict[str, str] = {}
    for pattern in recipe.skip_inputs:
        hits = [ref for ref in compressed if any(fnmatch.fnmatchcase(n, pattern) for n in (ref.name, ref.module))]
        if not hits:
            raise RecipeError(f"--skip-inputs {pattern!r} matches no compressed layer", "for example '*.down_proj'")
        skipped |= {ref.name: f"left out by --skip-inputs {pattern}" for ref in hits}
    folds = {reader: fold for fold in found.folds for reader in fold.readers}
    out = []
    for layer in layers:
        matrix = layer.ref.matrix
        if layer.format and matrix:
            if layer.ref.block == OUTSIDE:
                head = layer.ref.kind is not Kind.EMBEDDING
                layer = replace(layer, inputs_kept_because="outside the blocks" if head else None)
            elif reason := skipped.get(layer.ref.name):
                layer = replace(layer, inputs_kept_because=reason)
            else:
                check_pair(layer, fmt)
                fold = folds.get(layer.ref.name)
                site = InputSite(layer.ref, fold, found.norms.get(layer.ref.name))
                own = method.steps(fmt, site) if isinstance(method, InputMethod) else ()
                steps = own or (fmt.describe(),)
                stored = stored_slots(steps, matrix, dtype).values()
                after = layer.bytes_after + sum(slot.nbytes for slot in stored)
                name = str(steps[-1].get("format", fmt.name))
                ranges = not own and fmt.static
                layer = replace(layer, inputs=name, steps=steps, ranges=ranges, bytes_after=after)
        out.append(layer)
    if not any(layer.inputs for layer in out):
        raise UnsupportedError(
            f"--inputs {fmt.name}: no layer's inputs can be rounded: "
            + next(str(layer.inputs_kept_because) for layer in out if layer.format),
            "leave --inputs out",
        )
    return out


def check_pair(layer: LayerPlan, fmt: InputFormat) -> None:
    """Make sure that the format of inputs suits a compressed layer.

    Raises:
        RecipeError: Inputs on grids of powers have the exponent of their weights, and these have none.
        UnsupportedError: Its inputs do not divide into the format's groups.
    """
    assert layer.ref.matrix is not None
    assert layer.format is not None
    if fmt.kind == "power" and not layer.format.startswith("power"):
        raise RecipeError(
            f"{layer.ref.module}: --inputs {fmt.name} takes over the exponent of weights, which {layer.format} has not",
            f"use --method nupes --format power4, or --inputs int{fmt.bits}-token",
        )
    if refusal := fmt.refuse(layer.ref.matrix[1]):
        raise UnsupportedError(
            f"{layer.ref.module}: --inputs {fmt.name}: {refusal}",
            f'use --inputs int8-token, or --skip-inputs "*.{layer.ref.module.rpartition(".")[2]}"',
        )


def input_notes(layers: list[LayerPlan]) -> tuple[str, ...]:
    """Say which inputs stay in floating point although the recipe asks to round inputs; one sentence per reason."""
    reasons = Counter(layer.inputs_kept_because for layer in layers if layer.inputs_kept_because)
    notes = [f"the inputs of {count} layers are not rounded: {reason}" for reason, count in reasons.items()]
    if any(layer.inputs and layer.ref.kind is Kind.EXPERT for layer in layers):
        notes.append(
            "stock transformers rounds no inputs inside experts: a score there is that of their weights alone; "
            "compressor.load rounds them"
        )
    scaled = Counter(layer.ref.module.rpartition(".")[2] for layer in layers if scales_inputs(layer))
    if scaled:
        names = ", ".join(f"{count} {name}" for name, count in scaled.items())
        notes.append(
            f"inputs are scaled per channel in front of the layer ({names}): what its norm gives is the residual too, "
            "so nothing can be moved into the norm"
        )
    return tuple(notes)


def scales_inputs(layer: LayerPlan) -> bool:
    """Return whether factors per channel are applied to a layer's input as it arrives."""
    return any(step["op"] == "scale" for step in layer.steps)
