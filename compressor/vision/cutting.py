"""One cut: rank on some images, choose, remove, and put batch normalization right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.vision.budget import measure_sensitivity, sensitive_for
from compressor.vision.clusters import Graph
from compressor.vision.finetune import recalibrate
from compressor.vision.pixels import Pixels
from compressor.vision.ranking import RankingImages
from compressor.vision.selection import Ratios, select


def cut_filters(
    graph: Graph,
    method: Any,
    ratios: Ratios,
    images: Pixels,
    device: torch.device,
    seed: int,
    share: float | None = None,
    before_cut: Callable[[Mapping[str, Tensor]], None] = lambda keep: None,
) -> tuple[dict[str, list[int]], Ratios]:
    """Remove channels from the graph's model.

    Args:
        graph: Of the model, which is changed.
        method: Ranks filters, and has the options.
        ratios: Share of every cluster's channels that goes, unless sensitivity decides.
        images: Training images: some are ranked on, some give batch normalization its statistics.
        device: Where the model is.
        seed: Of the choice of images, and of chance.
        share: Multiply-adds to keep, handed out by sensitivity; None takes `ratios`.
        before_cut: Told which channels of every cluster stay, before the others go; may train the model.

    Returns:
        Layer -> which of its outputs it kept, and the ratios.

    Raises:
        RecipeError: The share is out of reach.
    """
    options = method.options
    wanted, balanced = getattr(options, "ranking_images", 256), getattr(options, "ranking_batch", "random")
    chosen = images.subset(images.images.draw(wanted, balanced == "balanced", seed))
    scores = method.score(graph, RankingImages(chosen, device, seed))
    if share is not None:
        found = measure_sensitivity(graph, scores, chosen, device, options.round_to)
        ratios = sensitive_for(graph, share, found, options.round_to)
    keep = select(graph, scores, ratios, options.round_to)
    before_cut(keep)
    kept = graph.cut(keep)
    if options.recalibrate:
        recalibrate(graph.model, images, images.images.draw(options.recalibrate, False, seed), device)
    return kept, ratios
