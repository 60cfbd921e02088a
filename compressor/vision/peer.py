"""Filters cut by Torch-Pruning's own pruner and importances, to compare with: the package's ways use its graph alone.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.vision.clusters import logits_of
from compressor.vision.pixels import Pixels

RANKING_IMAGES = 512
"""Images that `taylor` takes gradients of."""

BATCH = 64


def cut_with_torch_pruning(
    model: nn.Module, importance: str, share: float, images: Pixels, example: Tensor, seed: int
) -> None:
    """Remove the same share of the channels of every group that must be cut together, in place.

    Args:
        model: An image classifier; its last linear layer keeps its classes.
        importance: A key of `IMPORTANCES`.
        share: Of the channels that go, 0 to 1.
        images: Labelled images for `taylor`.
        example: Preprocessed images `[n, channels, height, width]` that the graph is traced with.
        seed: Picks the images, and what `random` removes.

    Raises:
        RecipeError: Unknown importance.
    """
    import torch_pruning

    if importance not in IMPORTANCES:
        raise RecipeError(f"Torch-Pruning has no importance {importance!r}", f"one of {', '.join(IMPORTANCES)}")
    torch.manual_seed(seed)
    model.eval().requires_grad_(True)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=IMPORTANCES[importance](torch_pruning.importance),
            pruning_ratio=share,
            ignored_layers=linears[-1:],
            output_transform=logits_of,
        )
        if importance == "taylor":
            _accumulate_gradients(model, images, seed)
        pruner.step()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


IMPORTANCES: Mapping[str, Callable[[Any], Any]] = {
    "l1": lambda tool: tool.GroupMagnitudeImportance(p=1),
    "l2": lambda tool: tool.GroupMagnitudeImportance(p=2),
    "taylor": lambda tool: tool.GroupTaylorImportance(),
    "random": lambda tool: tool.RandomImportance(),
}
"""Name -> the tool's importance, over whole groups, with its defaults."""


def _accumulate_gradients(model: nn.Module, images: Pixels, seed: int) -> None:
    """Leave the gradient of the mean loss over some images on the parameters."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:RANKING_IMAGES]
    for indices in order.split(BATCH):
        logits = logits_of(model(images[indices]))
        loss = nn.functional.cross_entropy(logits, images.labels[indices], reduction="sum") / len(order)
        loss.backward()
