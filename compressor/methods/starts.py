"""Where learning starts: the grid of every layer, and the weights that are rounded on it at first."""

from __future__ import annotations

from dataclasses import replace

import torch

from compressor.decision import Quantized
from compressor.formats.base import QParams, ScaledFormat, grouped
from compressor.methods.base import Block, Layer
from compressor.methods.gptq import GPTQ
from compressor.methods.grids import mse_clip

_INSIDE = 0.45
"""Steps that a weight may be off its code when it starts there."""

Starts = dict[str, tuple[Layer, QParams]]
"""Tensor name -> layer with the weight to start from, and its grid."""


def from_grids(block: Block, clip: bool) -> Starts:
    """Start from the weights as they are, on min-max grids or, with `clip`, on those of least rounding error."""
    starts: Starts = {}
    for layer, fmt in block.layers:
        assert isinstance(fmt, ScaledFormat)
        q = layer.fit(fmt)
        starts[layer.ref.name] = layer, mse_clip(layer.weight, fmt, q) if clip else q
    return starts


def from_gptq(block: Block, generator: torch.Generator) -> tuple[Starts, tuple[str, ...]]:
    """Start from what GPTQ makes of the layers; also returns its events.

    Every weight is moved to within `_INSIDE` steps of the code GPTQ gave it, and no further: those that GPTQ moved lie
    close to the edge of their code, and learning takes them back most easily.

    Args:
        block: Its layers carry their `SecondMoment`.
        generator: Handed to GPTQ.

    Raises:
        NumericalError: A second moment cannot be factored.
    """
    starts: Starts = {}
    events: list[str] = []
    for fmt in dict.fromkeys(fmt for _, fmt in block.layers):
        assert isinstance(fmt, ScaledFormat)
        layers = [layer for layer, own in block.layers if own == fmt]
        outcome = GPTQ().solve_group(layers, fmt, generator)
        events += outcome.events
        for layer in layers:
            decision = outcome.decisions[layer.ref.name]
            assert isinstance(decision, Quantized)
            value = grouped(fmt.decode(decision.codes, decision.qparams), fmt.group_size)
            room = _INSIDE * fmt.steps(decision.qparams).abs()  # [out, groups, 1]
            near = torch.clamp(grouped(layer.weight, fmt.group_size), value - room, value + room)
            starts[layer.ref.name] = replace(layer, weight=near.flatten(-2)), decision.qparams
    return starts, tuple(events)
