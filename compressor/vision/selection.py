"""Which channels stay, when it is known what share of every cluster goes.

Counts are those of the reference: `int(channels * (1 - ratio))`, in floating point. Among equals the lower index goes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.vision.clusters import Cluster, Graph

Ratios: TypeAlias = dict[str, float]
"""Cluster name -> share of its channels to remove."""


def kept_count(size: int, ratio: float, round_to: int = 1, groups: int = 1) -> int:
    """Return how many of a cluster's channels stay.

    Args:
        size: Channels.
        ratio: Share to remove, 0 to below 1.
        round_to: The count is raised to a multiple of this, where there are that many.
        groups: The count is lowered to a multiple of this, at least one per group.
    """
    kept = int(size * (1 - ratio))
    kept = min(-(-kept // round_to) * round_to, size)
    return max(kept // groups, 1) * groups


def choose(scores: Tensor, kept: int, groups: int = 1) -> Tensor:
    """Return the channels with the highest scores, ascending, int64 `[kept]`.

    With several groups the same channels of every group stay, by their mean score.

    Args:
        scores: One per channel.
        kept: How many stay; a multiple of `groups`.
        groups: Channel groups of grouped convolutions.
    """
    by_group = scores.reshape(groups, -1)
    order = torch.sort(by_group.mean(0), stable=True).indices
    local = order[len(order) - kept // groups :].sort().values
    return (torch.arange(groups)[:, None] * by_group.shape[1] + local).flatten()


def uniform(clusters: Sequence[Cluster], sparsity: float, ratios: Mapping[str, float] | None = None) -> Ratios:
    """Return the same ratio for all clusters, and others for those that globs name; the last match wins.

    Raises:
        RecipeError: A glob matches no cluster, or a ratio is not a share below 1.
    """
    chosen = {cluster.name: sparsity for cluster in clusters}
    for glob, ratio in (ratios or {}).items():
        matched = [c.name for c in clusters if any(fnmatch.fnmatch(member, glob) for member in c.members)]
        if not matched:
            raise RecipeError(f"ratios: {glob!r} matches no layer that can be cut", f"such as {clusters[0].name}")
        chosen.update(dict.fromkeys(matched, ratio))
    for name, ratio in chosen.items():
        if not 0 <= ratio < 1:
            raise RecipeError(f"{name}: cannot remove a share of {ratio}", "from 0 to below 1")
    return chosen


def select(graph: Graph, scores: Mapping[str, Tensor], ratios: Ratios, round_to: int = 1) -> dict[str, Tensor]:
    """Return the channels of every cluster that stay.

    Args:
        graph: Has the clusters.
        scores: One per channel, by cluster.
        ratios: What to remove.
        round_to: See `kept_count`.
    """
    keep = {}
    for cluster in graph.clusters:
        kept = kept_count(cluster.size, ratios[cluster.name], round_to, cluster.groups)
        keep[cluster.name] = choose(scores[cluster.name], kept, cluster.groups)
    return keep
