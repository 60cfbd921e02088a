"""What removing a channel does to the loss, to first order, class by class.

Molchanov et al. 2019 (arXiv 1906.10771): put a gate of 1 on a channel; the derivative of the loss by the gate is what
closing it changes, to first order. Squared for each image and averaged. Differs from the paper: the average is taken
within every class first, and over classes then, so that a class of few images counts as much as one of many; gates of
all layers that share a channel are one gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.vision.clusters import Graph, Norm, Producer, logits_of
from compressor.vision.options import TaylorOptions
from compressor.vision.ranking import RankingImages, normalised


class Taylor:
    """Ranks channels by the squared first-order change of the loss when they close."""

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = (
        "remove channels whose closing changes the loss least, every class counting the same; image classifiers"
    )
    Options = TaylorOptions

    def __init__(self, options: TaylorOptions | None = None) -> None:
        self.options = options or TaylorOptions()

    def score(self, graph: Graph, images: RankingImages) -> dict[str, Tensor]:
        """Return a score per channel, by cluster, 0..1 within it."""
        changes = gate_derivatives(graph, images)
        labels = images.pixels.labels
        scores = {}
        for name, change in changes.items():
            squares = change.square()  # [images, channels]
            if self.options.classes == "all":
                scores[name] = normalised(squares.mean(0))
                continue
            per_class = torch.stack([squares[labels == label].mean(0) for label in labels.unique()])
            scores[name] = normalised(per_class.mean(0) if self.options.classes == "mean" else per_class.amax(0))
        return scores


def gate_derivatives(graph: Graph, images: RankingImages) -> dict[str, Tensor]:
    """Return the derivative of every image's loss by the gate of every channel, float32 `[images, channels]`.

    The gate sits behind batch normalization where the cluster has any, so that a closed channel gives nothing at all;
    else on the layers' own outputs.
    """
    places: dict[str, Sequence[Norm | Producer]] = {c.name: c.norms or c.producers for c in graph.clusters}
    rows: dict[str, list[Tensor]] = {name: [] for name in places}
    for pixels, labels in images.pixels.batches(images.batch):
        found = _derivatives(graph, places, pixels.to(images.device), labels.to(images.device))
        for name, change in found.items():
            rows[name].append(change.cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _derivatives(
    graph: Graph, places: Mapping[str, Sequence[Norm | Producer]], pixels: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            # Behind a copy: activations that work in place would change what the derivative is multiplied by.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    names = {place.layer for producers in places.values() for place in producers}
    handles = [graph.model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.enable_grad():
            logits = logits_of(graph.model(pixels)).float()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    finally:
        for handle in handles:
            handle.remove()
    changes = {}
    for cluster in graph.clusters:
        total = torch.zeros(len(pixels), cluster.size, device=pixels.device)
        for place in places[cluster.name]:
            change = _per_channel(graph.model.get_submodule(place.layer), outputs[place.layer], gradients[place.layer])
            if isinstance(place, Norm):
                change = change[:, place.places.to(pixels.device)]
            total.index_add_(1, place.channels.to(pixels.device), change)
        changes[cluster.name] = total
    return changes


def _per_channel(module: nn.Module, output: Tensor, gradient: Tensor) -> Tensor:
    """Return output times gradient summed over positions, `[images, channels]`; linear layers have channels last."""
    product = (output * gradient).detach().float()
    if isinstance(module, nn.Linear):
        return product.reshape(len(product), -1, product.shape[-1]).sum(1)
    return product.flatten(2).sum(2)
