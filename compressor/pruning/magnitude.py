"""Magnitude pruning: the smallest weights of every matrix become zero."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.decision import Outcome
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.pruning.base import PruneOptions, PruningMethod, masked
from compressor.pruning.masks import keep_per_row, keep_per_tensor


class MagnitudeOptions(PruneOptions):
    """How much, and among which weights the smallest are sought."""

    per: Literal["tensor", "row"] = Field(
        "tensor", description="among which weights the smallest are sought; a pattern has its own groups"
    )


class Magnitude(PruningMethod):
    """Prunes by `|w|`."""

    name = "magnitude"
    summary = "the smallest weights go; no data, the baseline"
    stream = Stream.NONE
    Options = MagnitudeOptions

    def __init__(self, options: MagnitudeOptions | None = None) -> None:
        super().__init__(options or MagnitudeOptions())
        self.options: MagnitudeOptions

    def stats(self, fmt: QuantFormat) -> tuple[()]:
        """Return nothing: no data is looked at."""
        return ()

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask that scores `[out, in]` lead to."""
        if self.options.groups:
            return self.options.groups.choose(scores)
        choose = keep_per_row if self.options.per == "row" else keep_per_tensor
        return choose(scores, self.options.sparsity)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Prune one layer."""
        return Outcome({layer.ref.name: masked(layer.weight, self.keep(layer.weight.abs()))})
