"""Wanda: a weight counts as much as its size times the norm of the input it multiplies; kept weights do not move.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. The inputs of a
block come from the pruned blocks before it, and scores are compared within each row of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.calibration.channels import SquareSum
from compressor.decision import Outcome
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Stream
from compressor.pruning.base import ScoreOptions, ScorePruningMethod, masked


class Wanda(ScorePruningMethod):
    """Prunes by `|w_ij| ||x_j||`."""

    name = "wanda"
    summary = "Wanda: weight times the norm of its input, compared per output"
    stream = Stream.COMPRESSED
    Options = ScoreOptions

    def __init__(self, options: ScoreOptions | None = None) -> None:
        super().__init__(options or ScoreOptions())

    def stats(self, fmt: QuantFormat) -> tuple[SquareSum, ...]:
        """Return the sum of squares of every input."""
        return (SquareSum(),)

    def scores(self, layer: Layer) -> Tensor:
        """Return the score of every weight, float32 `[out, in]`; its size alone where no token was seen.

        Raises:
            NumericalError: The inputs are not finite.
        """
        if layer.stats[SquareSum()].n_tokens == 0:
            return layer.weight.abs()
        return layer.weight.abs() * layer.magnitude(SquareSum()).sqrt()

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Prune one layer."""
        unseen = layer.n_tokens == 0
        events = (f"{layer.ref.name}: no calibration token reached it; pruned by magnitude",) if unseen else ()
        return Outcome({layer.ref.name: masked(layer.weight, self.keep(self.scores(layer)))}, events)
