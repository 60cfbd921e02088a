"""Which units stay when their costs may add up to so much: the mask search of OPTIN.

Heads and neurons are sorted by importance, each for itself. For every number of heads, the best ones stay and the best
neurons fill what is left of the budget; the number with the largest total importance wins. Every part keeps its best
unit in any case.

Differs from the authors' code: a number of heads that alone exceeds the budget is passed over, so the budget is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.errors import RecipeError, UnsupportedError
from compressor.structured.units import Kind, Part, Unit


def search(units: Sequence[Unit], scores: Tensor, costs: Sequence[int], limit: int) -> list[Unit] | None:
    """Return the units that stay, in order, or None if the budget is out of reach.

    Args:
        units: All of them.
        scores: `[units]` importances, not negative.
        costs: What each costs.
        limit: What those that stay may cost together.
    """
    heads, neurons = (_Side.of(units, scores, costs, kind) for kind in ("heads", "neurons"))
    best: tuple[float, int, int] | None = None
    for n_heads in range(heads.least, len(heads.order) + 1):
        left = limit - int(heads.costs[n_heads])
        n_neurons = int(torch.searchsorted(neurons.costs, left, right=True)) - 1
        if left < 0 or n_neurons < neurons.least:
            continue
        total = float(heads.scores[n_heads] + neurons.scores[n_neurons])
        if best is None or total > best[0]:
            best = (total, n_heads, n_neurons)
    if best is None:
        return None
    kept = {*heads.order[: best[1]], *neurons.order[: best[2]]}
    return [unit for index, unit in enumerate(units) if index in kept]


def search_equal(units: Sequence[Unit], scores: Tensor, costs: Sequence[int], limit: int) -> list[Unit] | None:
    """Return the same with equally many heads in every attention part, and neurons in every feed-forward part.

    Raises:
        UnsupportedError: Parts of one kind differ in size to begin with.
    """
    members: dict[Part, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit.part, []).append(index)
    for kind in ("heads", "neurons"):
        sizes = {(part.inputs, part.width, part.weights) for part in members if part.kind == kind}
        if len(sizes) > 1:
            raise UnsupportedError(f"layers=equal: the {kind} of the layers differ already", "use layers=free")
    ranked = {part: sorted(own, key=lambda n: (-float(scores[n]), n)) for part, own in members.items()}
    counts = {kind: max((part.count for part in ranked if part.kind == kind), default=0) for kind in _KINDS}
    best: tuple[float, list[int]] | None = None
    for n_heads in range(min(counts["heads"], 1), counts["heads"] + 1):
        for n_neurons in range(counts["neurons"], min(counts["neurons"], 1) - 1, -1):
            chosen = [n for part, own in ranked.items() for n in own[: n_heads if part.heads else n_neurons]]
            if sum(costs[n] for n in chosen) > limit:
                continue
            total = float(scores[chosen].double().sum())
            if best is None or total > best[0]:
                best = (total, chosen)
            break  # fewer neurons with as many heads are worth less
    return None if best is None else [units[n] for n in sorted(best[1])]


_KINDS: tuple[Kind, Kind] = ("heads", "neurons")


class _Side:
    """Units of one kind in the order in which they are taken.

    Attributes:
        order: Their indices; the best one of every part comes first, then all others by score.
        least: How many stay in any case.
        scores: `[n + 1]` float64, importance of the first n.
        costs: `[n + 1]` int64, cost of the first n.
    """

    def __init__(self, order: list[int], least: int, scores: Tensor, costs: Tensor) -> None:
        self.order, self.least, self.scores, self.costs = order, least, scores, costs

    @classmethod
    def of(cls, units: Sequence[Unit], scores: Tensor, costs: Sequence[int], kind: str) -> _Side:
        own = [index for index, unit in enumerate(units) if unit.part.kind == kind]
        own.sort(key=lambda index: (-float(scores[index]), index))
        firsts: dict[Part, int] = {}
        for index in own:
            firsts.setdefault(units[index].part, index)
        best = list(firsts.values())
        order = best + [index for index in own if firsts[units[index].part] != index]
        zero = torch.zeros(1, dtype=torch.float64)
        values = torch.cat([zero, scores[order].double().cumsum(0)]) if order else zero
        spent = torch.tensor([0, *(costs[n] for n in order)]).cumsum(0)
        return cls(order, len(best), values, spent)


def check_reach(units: Sequence[Unit], costs: Sequence[int], fixed: int, dense: int, share: float, flag: str) -> None:
    """Refuse, before anything is measured, a budget that the least of every part exceeds.

    Args:
        units: All of them.
        costs: What each costs.
        fixed: What cannot be cut.
        dense: What all of it costs now.
        share: Of that, what may stay.
        flag: What the user gave, for the message.

    Raises:
        RecipeError: It is out of reach.
    """
    least = fixed
    parts: dict[Part, int] = {}
    for unit, cost in zip(units, costs, strict=True):
        parts[unit.part] = min(parts.get(unit.part, cost), cost)
    least += sum(parts.values())
    if least > share * dense:
        raise RecipeError(
            f"{flag}: with one group of heads and of neurons left in every layer, {least / dense:.3f} remain",
            "ask for less, skip less, or make groups of neurons smaller with --option group=N",
        )
