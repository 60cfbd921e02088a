"""Beta-Rank as a method: filters rank by weight, times the spread of output over that of input.

arXiv 2304.07461. The published formula has the spreads the other way round (`ratio=in_over_out`). Differs from the
published code: windows are cut from the right dimensions, with the layer's own padding and stride; all layers are
ranked on the same images; whole filters move with everything that belongs to them, unscaled; residual sums keep one set
of channels. See docs/methods/beta-rank.md.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compressor.vision.clusters import Graph, join
from compressor.vision.options import BetaRankOptions
from compressor.vision.ranking import RankingImages, rank_beta


class BetaRank:
    """Ranks filters by `L1 norm * spread of outputs / spread of inputs`, or the published formula, its inverse."""

    name: ClassVar[str] = "beta-rank"
    summary: ClassVar[str] = (
        "Beta-Rank: remove filters by L1 norm times the spread of output over input; image classifiers"
    )
    Options = BetaRankOptions

    def __init__(self, options: BetaRankOptions | None = None) -> None:
        self.options = options or BetaRankOptions()

    def score(self, graph: Graph, images: RankingImages) -> dict[str, Tensor]:
        """Return a score per channel, by cluster; see `measure_spread` for what it raises."""
        options = self.options
        layers = rank_beta(graph.model, graph.producers, images.batches(), options.ratio, options.robust)
        return join(graph, layers, options.combine)
