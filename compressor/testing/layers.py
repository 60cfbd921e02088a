"""Layers to try methods on (heavy-tailed weights, correlated inputs, a few loud channels), and what must hold after."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.calibration.stats import LANES, Accumulator, Statistic
from compressor.decision import Decision, Outcome, Quantized
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Method, Scope
from compressor.methods.scaling import Factors, FoldingMethod, FoldSite, moves_factors
from compressor.plan import Fold, FoldKind, Kind, WeightRef, Where
from compressor.testing.grids import assert_same_params

GAIN = "model.layers.0.norm.weight"
"""Name of the norm in front of the layers `fused_layers` makes."""


def correlated_inputs(width: int, tokens: int = 160, seed: int = 0) -> Tensor:
    """Return inputs `[tokens, width]` float32: a shared offset, correlated channels, and one in 32 much louder."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=rng) / width**0.5
    offset = 0.3 * torch.randn(width, generator=rng)
    x: Tensor = torch.randn(tokens, width, generator=rng) @ (mixing + torch.eye(width)) + offset
    loud = torch.randperm(width, generator=rng)[: max(width // 32, 1)]
    x[:, loud] *= 20
    return x


def heavy_tailed_weights(rows: int, width: int, seed: int = 0, spread: float = 0.02) -> Tensor:
    """Return weights `[rows, width]` float32 from Student's t distribution with four degrees of freedom."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, width, 5, generator=rng)
    return spread * normal[..., 0] / (normal[..., 1:].square().mean(-1)).sqrt()


def collect(specs: Sequence[Statistic], x: Tensor) -> dict[Statistic, Accumulator]:
    """Return the statistics of inputs `x` `[tokens, in]`, all lanes closed; no tokens leave them empty."""
    sums = {spec: spec.start(x.shape[1], x.device) for spec in specs}
    for total in sums.values():
        for rows in x.chunk(LANES):
            total.update(rows)
            total.close_lane()
    return sums


def fused_layers(
    specs: Sequence[Statistic], fmt: QuantFormat, weights: Sequence[Tensor], x: Tensor, dtype: str = "F32"
) -> list[Layer]:
    """Return layers that read the same input and that runtimes fuse, as the engine hands them to a method.

    Args:
        specs: The statistics the method asks for; the layers share them.
        fmt: The format, for the global scale of the set.
        weights: `[out, in]` float32 each, equal `in`.
        x: Their input `[tokens, in]`; no tokens make layers that calibration never reached.
        dtype: Dtype on disk, in safetensors spelling.
    """
    stats = collect(specs, x)
    shared = fmt.fit_global(weights)
    layers = []
    for index, weight in enumerate(weights):
        shape = (weight.shape[0], weight.shape[1])
        name = f"model.layers.0.part{index}.weight"
        ref = WeightRef(name, name, Where(), Kind.LINEAR, shape, shape, dtype, 0, "model.layers.0", "model.layers.0")
        layers.append(Layer(ref, weight.clone(), None if shared is None else shared.clone(), stats))
    return layers


def solve(method: Method, layers: Sequence[Layer], fmt: QuantFormat, seed: int = 0) -> Outcome:
    """Hand layers to a method at the scope it asks for, every call with a generator of its own; outcomes are merged.

    A method that moves factors gets the layers as the readers of a norm whose gain is one; the gain it leaves is the
    outcome's rewrite of `GAIN`.
    """
    assert method.scope in (Scope.LAYER, Scope.GROUP), f"scope {method.scope.value} cannot be tried on layers alone"
    if moves_factors(method):
        layers, factors = fold(method, layers, fmt)
        decided = _solve(method, layers, fmt, seed)
        return Outcome(decided.decisions, (*factors.events, *decided.events), rewrites={GAIN: 1 / factors.c})
    return _solve(method, layers, fmt, seed)


def fold(method: FoldingMethod, layers: Sequence[Layer], fmt: QuantFormat) -> tuple[list[Layer], Factors]:
    """Return the layers with the factors a method chooses for them in weights and statistics, and the factors."""
    names = tuple(layer.ref.name for layer in layers)
    where = Fold("model.layers.0.norm", FoldKind.NORM, 0, GAIN, None, names, layers[0].weight.shape[1])
    chosen = method.fold(FoldSite(where, tuple(layers), (fmt,) * len(layers), storable=lambda c: c))
    stats = copy.deepcopy(dict(layers[0].stats))
    for total in stats.values():
        total.divide(chosen.c)
    weights = [layer.weight * chosen.c for layer in layers]
    shared = fmt.fit_global(weights) if fmt.has_global_scale else None
    folded = [
        replace(layer, weight=weight, global_scale=shared, stats=stats)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return folded, chosen


def _solve(method: Method, layers: Sequence[Layer], fmt: QuantFormat, seed: int) -> Outcome:
    handed: Any = method
    if method.scope is Scope.GROUP:
        outcome: Outcome = handed.solve_group(layers, fmt, torch.Generator().manual_seed(seed))
        return outcome
    decisions: dict[str, Decision] = {}
    events: list[str] = []
    for layer in layers:
        outcome = handed.solve(layer, fmt, torch.Generator().manual_seed(seed))
        decisions.update(outcome.decisions)
        events += outcome.events
    return Outcome(decisions, tuple(events))


def output_error(decoded: Tensor, layer: Layer, x: Tensor) -> float:
    """Return `||X W'^T - X W^T||^2` in float64, for inputs `x` `[tokens, in]` and a substitute `[out, in]`."""
    return float((x.double() @ (decoded.double() - layer.weight.double()).T).square().sum())


def quantized(decision: Decision) -> Quantized:
    """Return a decision as codes; a method that keeps a weight must refuse it before."""
    assert isinstance(decision, Quantized), f"{decision}: say so in refuse(), when planning can still react"
    return decision


def assert_storable(fmt: QuantFormat, layers: Sequence[Layer], outcome: Outcome) -> None:
    """Fail unless every layer, and no other, has codes and parameters the format can store."""
    assert outcome.decisions.keys() == {layer.ref.name for layer in layers}, "not one decision for every layer"
    for layer in layers:
        decision = quantized(outcome.decisions[layer.ref.name])
        codes, q = decision.codes, decision.qparams
        assert (codes.dtype, codes.shape) == (torch.uint8, layer.weight.shape), f"codes {codes.dtype} {codes.shape}"
        assert int(codes.max()) < 2**fmt.bits, f"code {int(codes.max())} does not fit {fmt.bits} bits"
        assert torch.isfinite(fmt.decode(codes, q)).all(), f"{layer.ref.name} decodes to NaN or Inf"
        packed = fmt.pack(codes, q)
        written = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in packed.tensors.items()}
        planned = fmt.layout((codes.shape[0], codes.shape[1]))
        assert written == {suffix: (slot.dtype, slot.shape) for suffix, slot in planned.items()}
        again, stored = fmt.unpack(packed)
        assert torch.equal(again, codes), "codes change when packed"
        assert_same_params(stored, q)


def random_state() -> tuple[bytes, object, str]:
    """Return the state of the global generators of torch, Python and NumPy, comparable with `==`."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())


@contextmanager
def other_random_state(seed: int = 12345) -> Iterator[None]:
    """Seed the global generators anew inside a `with`, and restore them behind it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
