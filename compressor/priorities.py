"""Which layers get more bits first, by rules that measure no format: an alternative to measuring what each one costs.

The rules are those published for mixtures of experts: attention and shared experts are few weights that every token
uses; early layers matter more than late ones; weights with outliers, and blocks that turn their input most, are hard.
"QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts", arXiv 2406.08155.

Differs from the paper: all experts of a layer share a format, as readers want it, so experts are not ranked by how
often they are chosen; a group that would exceed the budget is left out, and smaller ones behind it are tried; how much
a block turns its input is measured, not predicted by a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.methods.eaquant_smoothing import outlier_scores
from compressor.plan import Kind, WeightRef


class Stage(StrEnum):
    """One rule; a list of them is gone through in order."""

    ATTENTION = "attention"
    """All attention projections."""
    SHARED = "shared"
    """Shared experts."""
    FIRST = "first"
    """Feed-forward layers (routed experts, or dense ones), first blocks first."""
    OUTLIERS = "outliers"
    """Feed-forward layers, those first whose heaviest weight sticks out most from its column."""
    IMPORTANCE = "importance"
    """Feed-forward layers, those first that turn what passes them most."""


class Place(StrEnum):
    """What a group of layers is part of."""

    ATTENTION = "attention"
    SHARED = "shared"
    FEED_FORWARD = "feed-forward"


@dataclass(frozen=True)
class Candidate:
    """A group of layers that gets one format.

    Attributes:
        name: Its name.
        block: Index of its block.
        place: What it is part of.
        small: Bytes in the smaller format.
        large: Bytes in the larger one.
    """

    name: str
    block: int
    place: Place
    small: int
    large: int


def parse_stages(text: str | None) -> tuple[Stage, ...]:
    """Turn `A,B,...` into stages; none for none, and for `measured`.

    Raises:
        RecipeError: One is unknown.
    """
    names = [name.strip() for name in (text or "measured").split(",") if name.strip()]
    if names == ["measured"]:
        return ()
    for name in names:
        if name not in list(Stage):
            raise RecipeError(f"--bits-by {name}: no such rule", f"one is measured; others: {', '.join(Stage)}")
    return tuple(Stage(name) for name in names)


def spend(
    candidates: Sequence[Candidate],
    stages: Sequence[Stage],
    budget: int,
    scores: Callable[[Stage], Mapping[str, float]],
) -> frozenset[str]:
    """Return the groups that get the larger format: by stage and rank, those left out that would exceed the budget.

    Args:
        candidates: All groups, in the order of the model.
        stages: Rules, in order; a group that none names keeps the smaller format.
        budget: Bytes of all groups.
        scores: Group name -> rank of the feed-forward groups, largest first, for stages that need one.
    """
    spent = sum(candidate.small for candidate in candidates)
    raised: set[str] = set()
    for stage in stages:
        for candidate in _ranked(candidates, stage, scores):
            more = candidate.large - candidate.small
            if candidate.name not in raised and spent + more <= budget:
                raised.add(candidate.name)
                spent += more
    return frozenset(raised)


def _ranked(
    candidates: Sequence[Candidate], stage: Stage, scores: Callable[[Stage], Mapping[str, float]]
) -> list[Candidate]:
    if stage in (Stage.ATTENTION, Stage.SHARED):
        return [candidate for candidate in candidates if candidate.place == stage.value]
    members = [candidate for candidate in candidates if candidate.place is Place.FEED_FORWARD]
    if stage is Stage.FIRST:
        return sorted(members, key=lambda candidate: candidate.block)
    rank = scores(stage)
    return sorted(members, key=lambda candidate: -rank[candidate.name])  # stable: ties go to earlier layers


def place_of(ref: WeightRef, model: nn.Module, stacks: Sequence[str]) -> Place:
    """Return what a layer is part of.

    Args:
        ref: One of a group's weights.
        model: The model it belongs to.
        stacks: Modules of fused experts.
    """
    path = ref.owner.split(".")
    above = [".".join(path[:end]) for end in range(1, len(path) + 1)]
    if any(type(model.get_submodule(name)).__name__.endswith("Attention") for name in above):
        return Place.ATTENTION
    if ref.kind is not Kind.EXPERT and any(ref.owner.startswith(f"{stack.rpartition('.')[0]}.") for stack in stacks):
        return Place.SHARED
    return Place.FEED_FORWARD


def outlier_score(weights: Sequence[Tensor]) -> float:
    """Return how far the heaviest weight of some matrices sticks out of its column: the largest of their scores.

    Args:
        weights: `[out, in]` each; layers that share a format are as hard as the hardest of them.
    """
    return float(outlier_scores([weight.float() for weight in weights]).max())


def turning(entering: Tensor, leaving: Tensor) -> Tensor:
    """Return minus the cosine between what enters and what leaves, for every token: the larger, the more it matters.

    Args:
        entering: `[..., width]`.
        leaving: `[..., width]`.
    """
    return -torch.cosine_similarity(entering.float(), leaving.float(), dim=-1).flatten()
