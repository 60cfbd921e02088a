"""Magnitude pruning: the smallest weights of every matrix become zero."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compressor.decision import Outcome
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.pruning.base import ScoreOptions, ScorePruningMethod, masked


class MagnitudeOptions(ScoreOptions):
    """How much, and among which weights the smallest are sought."""

    per: Literal["tensor", "row"] = Field(
        "tensor", description="among which weights the smallest are sought; a pattern has its own groups"
    )


class Magnitude(ScorePruningMethod):
    """Prunes by `|w|`."""

    name = "magnitude"
    summary = "the smallest weights go; no data, the baseline"
    stream = Stream.NONE
    Options = MagnitudeOptions

    def __init__(self, options: MagnitudeOptions | None = None) -> None:
        super().__init__(options or MagnitudeOptions())

    def stats(self, fmt: QuantFormat) -> tuple[()]:
        """Return nothing: no data is looked at."""
        return ()

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Prune one layer."""
        return Outcome({layer.ref.name: masked(layer.weight, self.keep(layer.weight.abs()))})
