"""Allocation against brute force, its bound, and what it promises."""

import itertools
import math
import random

import pytest

from compressor.allocation import Allocation, Choice, Group, allocate, hull, make_groups, uniform
from compressor.errors import RecipeError


def random_groups(seed: int, count: int = 6) -> list[Group]:
    """Groups of different sizes and sensitivities; some have a choice that no sensible allocation takes."""
    rng = random.Random(seed)
    groups = []
    for index in range(count):
        weights, loud = rng.randint(100, 2000), 10 ** rng.uniform(-2, 2)
        choices = [
            Choice(f"int{bits}", weights * bits // 8, loud * 4.0**-bits * rng.uniform(0.7, 1.4))
            for bits in (2, 3, 4, 6, 8)
        ]
        groups.append(Group(f"g{index}", (f"g{index}.weight",), tuple(choices)))
    return groups


def best(groups: list[Group], budget: int) -> float:
    costs = [
        math.fsum(choice.cost for choice in combination)
        for combination in itertools.product(*(group.choices for group in groups))
        if sum(choice.nbytes for choice in combination) <= budget
    ]
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
def test_against_every_combination(seed: int) -> None:
    groups = random_groups(seed)
    least = sum(min(choice.nbytes for choice in group.choices) for group in groups)
    most = sum(max(choice.nbytes for choice in group.choices) for group in groups)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = round(least + share * (most - least))
        found = allocate(groups, budget)
        optimum = best(groups, budget)
        assert found.nbytes <= budget
        assert found.nbytes == sum(choice.nbytes for choice in found.chosen.values())
        assert found.cost == pytest.approx(math.fsum(choice.cost for choice in found.chosen.values()))
        assert found.bound <= optimum * (1 + 1e-9) + 1e-12
        assert found.cost >= optimum * (1 - 1e-9)
        # What relaxing leaves open is at most the gain of the one upgrade that was cut in two.
        assert (
            found.cost - found.bound <= found.price * max(choice.nbytes for g in groups for choice in g.choices) + 1e-9
        )
        assert all(found.cost <= math.fsum(c.cost for c in one) + 1e-12 for one in uniform(groups, budget))


def test_many_groups_come_close_to_the_bound() -> None:
    groups = random_groups(3, count=200)
    budget = round(sum(group.choices[2].nbytes for group in groups) * 1.02)
    found = allocate(groups, budget)
    assert found.cost <= found.bound * 1.01
    same = min(math.fsum(c.cost for c in one) for one in uniform(groups, budget))
    assert found.cost < 0.7 * same  # what mixing is for: loud groups get more, quiet ones less


def test_more_bytes_never_cost_more() -> None:
    groups = random_groups(7, count=30)
    least = sum(group.choices[0].nbytes for group in groups)
    costs = [allocate(groups, round(least * share)).cost for share in (1, 1.3, 1.7, 2, 3, 4)]
    assert costs == sorted(costs, reverse=True)
    full = allocate(groups, least * 5)
    assert full.price == 0
    assert full.cost == pytest.approx(full.bound)


def test_hull_leaves_out_what_is_never_best() -> None:
    choices = [
        Choice("a", 10, 8.0),
        Choice("b", 20, 7.0),
        Choice("c", 30, 2.0),
        Choice("d", 40, 2.5),
        Choice("e", 50, 1.9),
    ]
    assert [choice.format for choice in hull(choices)] == ["a", "c", "e"]


def test_fused_layers_are_one_group() -> None:
    choices = {
        "q": (Choice("int4", 4, 1.0), Choice("int8", 8, 0.1)),
        "k": (Choice("int8", 2, 0.2), Choice("int4", 1, 2.0), Choice("nvfp4", 1, 1.0)),
        "o": (Choice("int4", 4, 1.0),),
    }
    groups = make_groups(choices, lambda name: "o" if name == "o" else "q+k")
    assert [group.name for group in groups] == ["q+k", "o"]
    assert groups[0].members == ("q", "k")
    assert groups[0].choices == (Choice("int4", 5, 3.0), Choice("int8", 10, pytest.approx(0.3)))
    with pytest.raises(RecipeError, match="share a format"):
        make_groups({"q": choices["o"], "k": (Choice("int8", 1, 0.0),)}, lambda _: "q+k")


def test_what_cannot_be_done() -> None:
    groups = random_groups(1)
    least = sum(group.choices[0].nbytes for group in groups)
    with pytest.raises(RecipeError, match="the budget leaves") as caught:
        allocate(groups, least - 1)
    assert f"{least:,}" in caught.value.message
    assert isinstance(allocate(groups, least), Allocation)
    broken = Group("g", ("w",), (Choice("int4", 1, math.nan),))
    with pytest.raises(RecipeError, match="no finite cost"):
        allocate([broken], 10)
