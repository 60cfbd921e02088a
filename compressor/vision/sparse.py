"""MaskSparsity: channels that will be cut are shrunk while the whole model trains, so that the cut takes little away.

"Pruning-aware Sparse Regularization" (github.com/CASIA-IVA-Lab/MaskSparsity): an L1 penalty on the scales of batch
normalization, of the chosen channels only; the others stay free. Differs: the penalty is taken as a proximal step,
which ends at 0 instead of swinging around it; offsets shrink with the scales, since a channel of scale 0 still gives
its offset; and unless told otherwise the penalty is as strong as the few epochs need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.vision.clusters import Graph
from compressor.vision.finetune import Training, train
from compressor.vision.pixels import Pixels

HALF = 0.25 + 1 / (2 * math.pi)
"""Share of `learning rate * steps` that a cosine schedule has spent halfway."""


@dataclass(frozen=True)
class Shrunk:
    """What the training did.

    Attributes:
        strength: The penalty's.
        history: Mean loss of every epoch.
        going: Mean magnitude of the scales of the channels that go, before and after.
        staying: The same of the channels that stay.
    """

    strength: float
    history: tuple[float, ...]
    going: tuple[float, float]
    staying: tuple[float, float]


def shrink(
    graph: Graph,
    keep: Mapping[str, Tensor],
    images: Pixels,
    settings: Training,
    device: torch.device,
    *,
    strength: float | None = None,
    folder: Path | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> Shrunk:
    """Train the graph's model in place while the channels that will be cut are pulled to 0.

    Args:
        graph: Of the model, uncut.
        keep: Cluster -> channels that will stay.
        images: To train on.
        settings: How.
        device: Where the model is.
        strength: Of the penalty: what it takes from a scale in one step is `strength * learning rate`. None takes
            what brings the largest scale to 0 halfway, if nothing pulls back.
        folder: As `train`.
        told: Hears one line per epoch.

    Raises:
        RecipeError: No channel that goes passes a batch normalization.
        NumericalError: The loss is not finite.
    """
    masks = channels_that_go(graph, keep)
    if not any(bool(mask.any()) for mask in masks.values()):
        raise RecipeError(
            "sparse_epochs shrinks scales of batch normalization, and no channel that goes passes any",
            "leave it out; fine-tune with --finetune",
        )
    norms = {name: graph.model.get_submodule(name) for name in masks}
    if strength is None:
        steps = settings.epochs * -(-len(images) // settings.batch)
        largest = max(float(_magnitude(norms[name])[mask].max()) for name, mask in masks.items() if mask.any())
        strength = largest / (HALF * settings.lr * steps)
    pull = strength

    def after_step(rate: float) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                for parameter in (norms[name].weight, norms[name].bias):
                    assert isinstance(parameter, Tensor)
                    smaller = parameter.sign() * (parameter.abs() - pull * rate).clamp_min(0)
                    parameter.copy_(torch.where(mask, smaller, parameter))

    before = _scales(norms, masks)
    progress = train(graph.model, images, settings, device, folder=folder, told=told, after_step=after_step)
    after = _scales(norms, masks)
    losses = tuple(entry["loss"] for entry in progress.history)
    return Shrunk(pull, losses, (before[0], after[0]), (before[1], after[1]))


def channels_that_go(graph: Graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return batch normalization -> which of its channels will be cut, bool `[channels]`; those with a scale only."""
    masks: dict[str, Tensor] = {}
    for cluster in graph.clusters:
        goes = torch.ones(cluster.size, dtype=torch.bool)
        goes[keep[cluster.name]] = False
        for norm in cluster.norms:
            weight = getattr(graph.model.get_submodule(norm.layer), "weight", None)
            if weight is None:
                continue
            mask = masks.setdefault(norm.layer, torch.zeros(len(weight), dtype=torch.bool, device=weight.device))
            mask[norm.places.to(weight.device)] = goes[norm.channels].to(weight.device)
    return masks


def _magnitude(norm: nn.Module) -> Tensor:
    return norm.get_parameter("weight").detach().abs()


def _scales(norms: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the mean magnitude of the scales that go and of those that stay."""
    weights = {name: _magnitude(norms[name]) for name in masks}
    going = torch.cat([weights[name][mask] for name, mask in masks.items()])
    staying = torch.cat([weights[name][~mask] for name, mask in masks.items()])
    return float(going.mean()), float(staying.mean())
