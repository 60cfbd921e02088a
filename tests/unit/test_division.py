"""Who solves what: layers that read one tensor go together, everybody has work, and it is always the same."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.engine.division import divide
from compressor.methods.base import Scope


def layer(name: str, shape: tuple[int, int], fed_by: str, fused_with: str) -> Any:
    return SimpleNamespace(ref=SimpleNamespace(name=name, matrix=shape, fed_by=fed_by, fused_with=fused_with))


def llama_block() -> list[Any]:
    return [
        *(layer(name, (64, 64), "attention", "qkv") for name in "qkv"),
        layer("o", (64, 64), "o", "o"),
        *(layer(name, (172, 64), "mlp", "gate-up") for name in ("gate", "up")),
        layer("down", (64, 172), "down", "down"),
    ]


def test_layers_that_read_one_tensor_go_together() -> None:
    # As NUPES has it: nothing must agree, yet q, k and v need the same statistics.
    block = [layer(name, (64, 64), "attention", name) for name in "qkv"] + llama_block()[3:]
    division = divide(block, Scope.LAYER, 3)
    assert len(division.sets) == 6
    assert len(set(division.owners[:3])) == 1
    for members, owner in zip(division.sets, division.owners, strict=True):
        assert {division.keepers[member.ref.fed_by] for member in members} == {owner}


def test_chains_of_sets_and_tensors_are_one() -> None:
    # a and b agree, b and c read one tensor, c and d agree.
    chain = [("a", "x", "1"), ("b", "y", "1"), ("c", "y", "2"), ("d", "z", "2"), ("e", "w", "3")]
    division = divide([layer(name, (8, 8), fed, fused) for name, fed, fused in chain], Scope.GROUP, 2)
    assert [len(members) for members in division.sets] == [2, 2, 1]
    assert division.owners[0] == division.owners[1] != division.owners[2]


def test_the_heaviest_goes_first_and_alone() -> None:
    division = divide(llama_block(), Scope.GROUP, 2)
    owner = dict(zip([members[0].ref.name for members in division.sets], division.owners, strict=True))
    assert owner["down"] == 0
    assert owner["gate"] == owner["q"] == 1


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_experts_are_spread_evenly(n: int) -> None:
    experts = [layer(f"{i}.{r}", (64, 32), f"{i}.{r}", f"{i}.{r}") for i, r in itertools.product(range(16), "du")]
    owners = divide(experts, Scope.LAYER, n).owners
    counts = [owners.count(rank) for rank in range(n)]
    assert sum(counts) == 32
    assert max(counts) - min(counts) <= 1


def test_whole_blocks_are_decided_in_one_place() -> None:
    division = divide(llama_block(), Scope.BLOCK, 4)
    assert [len(members) for members in division.sets] == [7]
    assert division.owners == (0,)
    assert set(division.keepers.values()) == {0}
    assert divide([], Scope.BLOCK, 4).sets == ()
