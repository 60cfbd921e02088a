"""Chance as a method: what every ranking has to beat."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compressor.vision.clusters import Graph, join
from compressor.vision.options import CutOptions
from compressor.vision.ranking import RankingImages, rank_random


class Chance:
    """Ranks filters at random."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "remove filters by chance; image classifiers"
    Options = CutOptions

    def __init__(self, options: CutOptions | None = None) -> None:
        self.options = options or CutOptions()

    def score(self, graph: Graph, images: RankingImages) -> dict[str, Tensor]:
        """Return a random score per channel, by cluster."""
        return join(graph, rank_random(graph.producers, images.seed), self.options.combine)
