"""Which format each layer gets when the whole must fit a number of bytes.

Every group of layers (layers that a runtime fuses are one group: they share a format) offers choices, each with its
bytes and its cost: what it is expected to add to the KL divergence, or any other number that adds up. Choosing one
each, at least total cost within the budget, is the multiple-choice knapsack. The solution is that of its Lagrangian
relaxation: each group keeps the choices on the lower convex hull of (bytes, cost), and upgrades are taken in the order
of cost saved per byte; the first one that does not fit splits the budget, and smaller ones are tried behind it.
Sinha & Zoltners 1979, "The multiple-choice knapsack problem", Operations Research 27(3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.errors import RecipeError


@dataclass(frozen=True)
class Choice:
    """One way to store a group.

    Attributes:
        format: As `--set` takes it: a format's name, with `:GROUP` behind it where it is not the default.
        nbytes: Bytes of all its members, scales included.
        cost: What storing it so is expected to cost; costs of groups are added up.
    """

    format: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Group:
    """Layers that get one format.

    Attributes:
        name: What it is called in tables.
        members: Names of its tensors.
        choices: At least one.
    """

    name: str
    members: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        chosen: Group name -> its choice.
        nbytes: Bytes of all groups.
        cost: Their total cost.
        bound: No allocation within the budget costs less than this.
        price: Cost the next byte would save, where the budget ran out; 0 if everything fits at its best.
    """

    chosen: Mapping[str, Choice]
    nbytes: int
    cost: float
    bound: float
    price: float


def make_groups(choices: Mapping[str, Sequence[Choice]], group_of: Callable[[str], str]) -> tuple[Group, ...]:
    """Join layers that must share a format; a group offers the formats all its members offer.

    Args:
        choices: Tensor name -> its choices.
        group_of: Name of a tensor's group.

    Raises:
        RecipeError: The members of a group have no format in common.
    """
    members: dict[str, list[str]] = {}
    for name in choices:
        members.setdefault(group_of(name), []).append(name)
    groups = []
    for group, names in members.items():
        by_format = [{choice.format: choice for choice in choices[name]} for name in names]
        shared = [key for key in by_format[0] if all(key in other for other in by_format)]
        if not shared:
            raise RecipeError(f"{group}: its layers share a format, and none suits {' and '.join(names)}")
        joined = [
            Choice(key, sum(one[key].nbytes for one in by_format), math.fsum(one[key].cost for one in by_format))
            for key in shared
        ]
        groups.append(Group(group, tuple(names), tuple(joined)))
    return tuple(groups)


def allocate(groups: Sequence[Group], budget: int) -> Allocation:
    """Choose a format for every group so that all fit `budget` bytes, at the least total cost (see the module).

    Never worse than one format for all groups, if there is one that fits.

    Raises:
        RecipeError: Even the smallest choices do not fit, or a cost is not a number.
    """
    for group in groups:
        if not all(math.isfinite(choice.cost) for choice in group.choices):
            raise RecipeError(f"{group.name}: a choice has no finite cost", "leave out the format that cannot store it")
    hulls = [hull(group.choices) for group in groups]
    smallest = sum(choices[0].nbytes for choices in hulls)
    if smallest > budget:
        raise RecipeError(
            f"the smallest formats take {smallest:,} bytes of compressed weights, the budget leaves {budget:,}",
            "allow a larger size, or formats with fewer bits",
        )
    upgrades = sorted(
        (
            ((before.cost - after.cost) / (after.nbytes - before.nbytes), index, step)
            for index, choices in enumerate(hulls)
            for step, (before, after) in enumerate(itertools.pairwise(choices), 1)
        ),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    at, left = [0] * len(hulls), budget - smallest
    bound = math.fsum(choices[0].cost for choices in hulls)
    price, full = 0.0, False
    for rate, index, step in upgrades:
        needed = hulls[index][step].nbytes - hulls[index][step - 1].nbytes
        fits = needed <= left and at[index] == step - 1
        if not full:
            # The bound takes the first upgrade that does not fit in part: that is what relaxing allows.
            bound -= rate * (needed if fits else left)
            price, full = (0.0, False) if fits else (rate, True)
        if fits:
            at[index], left = step, left - needed
    chosen = [hulls[index][step] for index, step in enumerate(at)]
    chosen = min([chosen, *uniform(groups, budget)], key=lambda found: math.fsum(choice.cost for choice in found))
    return Allocation(
        {group.name: choice for group, choice in zip(groups, chosen, strict=True)},
        sum(choice.nbytes for choice in chosen),
        math.fsum(choice.cost for choice in chosen),
        max(bound, 0.0),
        price,
    )


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of (bytes, cost), from the smallest to the cheapest."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.nbytes, one.cost)):
        if found and choice.cost >= found[-1].cost:
            continue  # larger and no better
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], choice):
            found.pop()
        found.append(choice)
    return found


def uniform(groups: Sequence[Group], budget: int) -> list[list[Choice]]:
    """Return every way to give all groups one format that fits the budget."""
    found = []
    for format in dict.fromkeys(choice.format for group in groups for choice in group.choices):
        same = [choice for group in groups for choice in group.choices if choice.format == format]
        if len(same) == len(groups) and sum(choice.nbytes for choice in same) <= budget:
            found.append(same)
    return found


def _slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.nbytes - a.nbytes)
