"""The L1 norm as a method: filters with small weights go (Li et al. 2017, arXiv 1608.08710)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compressor.vision.clusters import Graph, join
from compressor.vision.options import CutOptions
from compressor.vision.ranking import RankingImages, rank_l1


class L1:
    """Ranks filters by the sum of their magnitudes."""

    name: ClassVar[str] = "l1"
    summary: ClassVar[str] = "remove the filters with the smallest weights; image classifiers, baseline"
    Options = CutOptions

    def __init__(self, options: CutOptions | None = None) -> None:
        self.options = options or CutOptions()

    def score(self, graph: Graph, images: RankingImages) -> dict[str, Tensor]:
        """Return a score per channel, by cluster."""
        return join(graph, rank_l1(graph.producers), self.options.combine)
