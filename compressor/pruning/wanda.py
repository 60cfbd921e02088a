"""Wanda: a weight counts as much as its size times the norm of the input it multiplies; kept weights do not move.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. The inputs of a
block come from the pruned blocks before it, and scores are compared within each row of a matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.norms import SquareSum
from compressor.decision import Outcome
from compressor.errors import NumericalError
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.pruning.base import PruneOptions, PruningMethod, masked
from compressor.pruning.masks import keep_per_row, keep_per_tensor


class WandaOptions(PruneOptions):
    """How much, and among which weights the lowest scores are sought."""

    per: Literal["row", "tensor"] = Field(
        "row", description="among which weights the lowest scores are sought; a pattern has its own groups"
    )


class Wanda(PruningMethod):
    """Prunes by `|w_ij| ||x_j||`."""

    name = "wanda"
    summary = "Wanda: weight times the norm of its input, compared per output"
    stream = Stream.COMPRESSED
    Options = WandaOptions

    def __init__(self, options: WandaOptions | None = None) -> None:
        super().__init__(options or WandaOptions())
        self.options: WandaOptions

    def stats(self, fmt: QuantFormat) -> tuple[SquareSum, ...]:
        """Return the sum of squares of every input."""
        return (SquareSum(),)

    def scores(self, layer: Layer) -> Tensor:
        """Return the score of every weight, float32 `[out, in]`; its size alone where no token was seen.

        Raises:
            NumericalError: The inputs are not finite.
        """
        total = layer.stats[SquareSum()]
        if total.n_tokens == 0:
            return layer.weight.abs()
        squares = total.value()
        if not torch.isfinite(squares).all():
            raise NumericalError(
                f"{layer.ref.name}: its calibration inputs are not finite (largest magnitude {total.max_abs:.3g})",
                "use other calibration data, or leave the layer out with --skip",
            )
        return layer.weight.abs() * squares.sqrt()

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask that scores `[out, in]` lead to."""
        if self.options.groups:
            return self.options.groups.choose(scores)
        choose = keep_per_row if self.options.per == "row" else keep_per_tensor
        return choose(scores, self.options.sparsity)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Prune one layer."""
        unseen = layer.n_tokens == 0
        events = (f"{layer.ref.name}: no calibration token reached it; pruned by magnitude",) if unseen else ()
        return Outcome({layer.ref.name: masked(layer.weight, self.keep(self.scores(layer)))}, events)
