"""Where learning starts: the grid of every layer, and the weights that are rounded on it at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from compressor.decision import Quantized
from compressor.formats.base import QParams, QuantFormat, ScaledFormat, grouped
from compressor.methods.base import Layer
from compressor.methods.gptq import GPTQ
from compressor.methods.grids import mse_clip

_INSIDE = 0.45
"""Steps that a weight may be off its code when it starts there."""

Start = Literal["mse", "gptq", "minmax"]
"""What learned methods can start from. Spelled once: typing may hand out one of two `Literal`s that differ in order."""

Starts = dict[str, tuple[Layer, QParams]]
"""Tensor name -> layer with the weight to start from, and its grid."""


def from_grid(layer: Layer, fmt: QuantFormat, clip: bool) -> tuple[Layer, QParams]:
    """Start from the weight as it is, on its min-max grid or, with `clip`, on that of least rounding error."""
    assert isinstance(fmt, ScaledFormat)
    q = layer.fit(fmt)
    return layer, mse_clip(layer.weight, fmt, q) if clip else q


def from_gptq(
    layers: Sequence[tuple[Layer, QuantFormat]], generator: torch.Generator
) -> tuple[Starts, tuple[str, ...]]:
    """Start from what GPTQ makes of the layers; also returns its events.

    Every weight is moved to within `_INSIDE` steps of the code GPTQ gave it, and no further: those that GPTQ moved lie
    close to the edge of their code, and learning takes them back most easily.

    Args:
        layers: With their formats; they carry their `SecondMoment`.
        generator: Handed to GPTQ.

    Raises:
        NumericalError: A second moment cannot be factored.
    """
    starts: Starts = {}
    events: list[str] = []
    for fmt in dict.fromkeys(fmt for _, fmt in layers):
        assert isinstance(fmt, ScaledFormat)
        alike = [layer for layer, own in layers if own == fmt]
        outcome = GPTQ().solve_group(alike, fmt, generator)
        events += outcome.events
        for layer in alike:
            decision = outcome.decisions[layer.ref.name]
            assert isinstance(decision, Quantized)
            value = grouped(fmt.decode(decision.codes, decision.qparams), fmt.group_size)
            room = _INSIDE * fmt.steps(decision.qparams).abs()  # [out, groups, 1]
            near = torch.clamp(grouped(layer.weight, fmt.group_size), value - room, value + room)
            starts[layer.ref.name] = replace(layer, weight=near.flatten(-2)), decision.qparams
    return starts, tuple(events)
