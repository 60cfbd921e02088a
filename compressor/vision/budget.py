"""How much goes from where: multiply-adds to keep, by the same ratio everywhere or by what each layer can bear."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.vision.clusters import Cluster, Graph, logits_of
from compressor.vision.complexity import layer_macs
from compressor.vision.finetune import class_weights, recalibrate
from compressor.vision.pixels import Pixels
from compressor.vision.selection import Ratios, choose, kept_count

HALVINGS = 20
"""Of the search for a uniform ratio: far finer than one channel of any layer."""

LEVELS = (0.25, 0.5, 0.75)
"""Shares of a cluster that are removed to see what it does to the loss."""

STEP, LARGEST = 0.05, 0.9
"""Of the ratios that are handed out by sensitivity."""


class Macs:
    """Multiply-adds of a model for any widths of its clusters, without cutting it.

    A layer's are the product of its outputs' and inputs' channels, so those of a cut model follow from the original's.
    """

    def __init__(self, graph: Graph) -> None:
        self._dense = layer_macs(graph.model, graph.example)
        self._sizes = {cluster.name: cluster.size for cluster in graph.clusters}
        self._out = {member: cluster.name for cluster in graph.clusters for member in cluster.members}
        self._in: dict[str, list[tuple[str, int]]] = {}
        for cluster in graph.clusters:
            for reader, per_channel in cluster.readers:
                self._in.setdefault(reader, []).append((cluster.name, per_channel))
        self._inputs = {name: _inputs(graph.model.get_submodule(name)) for name in self._in}

    @property
    def dense(self) -> int:
        """Of the model as it is."""
        return sum(self._dense.values())

    def of(self, kept: Mapping[str, int]) -> int:
        """Return the multiply-adds for one image when so many channels of each cluster are left."""
        total = 0
        for layer, macs in self._dense.items():
            cluster = self._out.get(layer)
            if cluster is not None:
                macs = macs // self._sizes[cluster] * kept[cluster]
            if layer in self._in:
                gone = sum((self._sizes[name] - kept[name]) * per for name, per in self._in[layer])
                macs = macs // self._inputs[layer] * (self._inputs[layer] - gone)
            total += macs
        return total


def kept_counts(graph: Graph, ratios: Ratios, round_to: int) -> dict[str, int]:
    """Return how many channels of every cluster stay."""
    return {c.name: kept_count(c.size, ratios[c.name], round_to, c.groups) for c in graph.clusters}


def uniform_for(graph: Graph, share: float, at: Callable[[float], Ratios], round_to: int) -> Ratios:
    """Return the ratios of the least removal that leaves at most a share of the multiply-adds, by bisection.

    Args:
        graph: Has the clusters; not changed.
        share: Multiply-adds to keep, 0 to 1.
        at: Strength from 0 to 1 -> ratios; more strength removes more.
        round_to: See `kept_count`.

    Raises:
        RecipeError: Not even the strongest removal gets there.
    """
    macs = Macs(graph)

    def cost(strength: float) -> int:
        return macs.of(kept_counts(graph, at(strength), round_to))

    _check_reach(cost(1.0) / macs.dense, share)
    low, high = 0.0, 1.0
    if cost(low) <= share * macs.dense:
        return at(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if cost(middle) > share * macs.dense:
            low = middle
        else:
            high = middle
    return at(high)


@dataclass(frozen=True)
class Sensitivity:
    """What removing part of a cluster, and nothing else, does to the loss.

    Attributes:
        rise: Cluster -> rise of the mean loss at each of `LEVELS`; every class weighs the same.
    """

    rise: dict[str, tuple[float, ...]]

    def at(self, cluster: str, ratio: float) -> float:
        """Return the rise for any ratio: linear between the levels, twice as steep behind the last."""
        points = [(0.0, 0.0), *zip(LEVELS, _rising(self.rise[cluster]), strict=True)]
        for (left, low), (right, high) in itertools.pairwise(points):
            if ratio <= right:
                return low + (high - low) * (ratio - left) / (right - left)
        (left, low), (right, high) = points[-2:]
        return high + 2 * (high - low) * (ratio - right) / (right - left)


def measure_sensitivity(
    graph: Graph, scores: Mapping[str, Tensor], images: Pixels, device: torch.device, round_to: int = 1
) -> Sensitivity:
    """Cut each cluster by itself, on copies, and see what it does to the loss on some images.

    Args:
        graph: Of the model, which is not changed.
        scores: One per channel, by cluster.
        images: To look at; statistics of batch normalization are computed from them too.
        device: Where the model is.
        round_to: See `kept_count`.
    """
    before = _loss(graph.model, images, device)
    rise = {}
    for cluster in graph.clusters:
        losses = [_loss(twin, images, device) for twin in _cut_twins(graph, cluster, scores, images, device, round_to)]
        rise[cluster.name] = tuple(loss - before for loss in losses)
    return Sensitivity(rise)


def sensitive_for(graph: Graph, share: float, sensitivity: Sensitivity, round_to: int) -> Ratios:
    """Return ratios that leave at most a share of the multiply-adds, taken where the loss rises least for each saved.

    Args:
        graph: Has the clusters; not changed.
        share: Multiply-adds to keep, 0 to 1.
        sensitivity: Of the clusters.
        round_to: See `kept_count`.

    Raises:
        RecipeError: Not even removing `LARGEST` of every cluster gets there.
    """
    macs = Macs(graph)
    ratios = {cluster.name: 0.0 for cluster in graph.clusters}
    strongest = dict.fromkeys(ratios, LARGEST)
    _check_reach(macs.of(kept_counts(graph, strongest, round_to)) / macs.dense, share)
    now = macs.of(kept_counts(graph, ratios, round_to))
    while now > share * macs.dense:
        best: tuple[float, str, float, int] | None = None
        for name, ratio in ratios.items():
            new, cost = _next(graph, macs, ratios, name, round_to, now)
            if cost >= now:
                continue
            price = (sensitivity.at(name, new) - sensitivity.at(name, ratio)) / (now - cost)
            if best is None or price < best[0]:
                best = (price, name, new, cost)
        assert best is not None
        ratios[best[1]], now = best[2], best[3]
    return ratios


def _next(graph: Graph, macs: Macs, ratios: Ratios, name: str, round_to: int, now: int) -> tuple[float, int]:
    """Return the next larger ratio of a cluster that saves anything, and the multiply-adds then."""
    ratio, cost = ratios[name], now
    while ratio < LARGEST and cost >= now:
        ratio = min(ratio + STEP, LARGEST)
        cost = macs.of(kept_counts(graph, {**ratios, name: ratio}, round_to))
    return ratio, cost


def _rising(values: tuple[float, ...]) -> Iterator[float]:
    """Yield values that never fall and are never below 0: a loss that falls by chance is no reason to cut more."""
    highest = 0.0
    for value in values:
        highest = max(highest, value)
        yield highest


def _cut_twins(
    graph: Graph, cluster: Cluster, scores: Mapping[str, Tensor], images: Pixels, device: torch.device, round_to: int
) -> Iterator[nn.Module]:
    for level in LEVELS:
        twin = copy.deepcopy(graph.model)
        kept = kept_count(cluster.size, level, round_to, cluster.groups)
        Graph(twin, graph.example).cut({cluster.name: choose(scores[cluster.name], kept, cluster.groups)})
        recalibrate(twin, images, torch.arange(len(images)), device)
        yield twin


@torch.no_grad()
def _loss(model: nn.Module, images: Pixels, device: torch.device, batch: int = 64) -> float:
    """Return the mean cross-entropy, every class weighing the same."""
    weights = class_weights(images, device)
    total = 0.0
    for pixels, labels in images.batches(batch):
        logits = logits_of(model(pixels.to(device))).float()
        total += float(nn.functional.cross_entropy(logits, labels.to(device), weight=weights, reduction="sum"))
    return total / len(images)


def _check_reach(reached: float, share: float) -> None:
    if reached > share:
        raise RecipeError(
            f"--macs {share}: the narrowest cut still costs {reached:.3f} of the multiply-adds",
            f"ask for at least {reached:.3f}, or skip fewer layers",
        )


def _inputs(module: nn.Module) -> int:
    return int(getattr(module, "in_features", 0) or getattr(module, "in_channels", 0))
