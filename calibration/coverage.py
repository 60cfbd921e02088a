"""Tokens per expert: counted, held to a minimum, and topped up where the router sends too few.

Three sources, in this order: calibration tokens the router sends to the expert; tokens it sends there from a reserve of
further windows, which no other layer looks at; and calibration tokens it sends elsewhere, the ones it likes the expert
best for. See `docs/moe.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CoverageError

Expert = tuple[str, int]
"""Module name of a stack, and an index into it."""

Router = Callable[[Tensor], Tensor]
"""`[tokens, hidden]` -> how much of every token it would give to each expert, `[tokens, experts]`."""


@dataclass
class Coverage:
    """Counts of one block.

    Attributes:
        minimum: Tokens every expert is to have; 0 counts only.
        routed: Expert -> calibration tokens the router sends there.
        reserve: Expert -> tokens taken from the reserve.
        forced: Expert -> tokens sent there against the router.
        top_k: Stack -> experts per token.
        from_reserve: Whether rows that come now are those of the reserve.
    """

    minimum: int = 0
    routed: dict[Expert, int] = field(default_factory=dict)
    reserve: dict[Expert, int] = field(default_factory=dict)
    forced: dict[Expert, int] = field(default_factory=dict)
    top_k: dict[str, int] = field(default_factory=dict)
    from_reserve: bool = False

    def take(self, expert: Expert, offered: int) -> int:
        """Count rows and return how many of those offered are to be used."""
        if not self.from_reserve:
            self.routed[expert] = self.routed.get(expert, 0) + offered
            return offered
        used = min(offered, max(self.minimum - self.total(expert), 0))
        self.reserve[expert] = self.reserve.get(expert, 0) + used
        return used

    def join(self, everyones: Sequence[Coverage]) -> None:
        """Count what all processes sent to experts, each of samples of its own, before any expert is topped up."""
        self.routed = {}
        for coverage in everyones:
            assert not coverage.reserve, "samples are shared before experts are topped up"
            assert not coverage.forced
            self.top_k |= coverage.top_k
            for expert, tokens in coverage.routed.items():
                self.routed[expert] = self.routed.get(expert, 0) + tokens

    def add(self, other: Coverage) -> None:
        """Take over the counts of other experts of the same block."""
        for mine, theirs in zip(self._counts, other._counts, strict=True):
            mine.update(theirs)
        self.top_k |= other.top_k

    @property
    def _counts(self) -> tuple[dict[Expert, int], ...]:
        return self.routed, self.reserve, self.forced

    def total(self, expert: Expert) -> int:
        """Return the tokens an expert has from all sources."""
        return sum(counts.get(expert, 0) for counts in self._counts)

    def lacking(self) -> dict[Expert, int]:
        """Return the experts below the minimum and how many tokens each of them lacks."""
        return {expert: n for expert in self.routed if (n := self.minimum - self.total(expert)) > 0}

    def check(self) -> None:
        """Make sure that no expert is below the minimum.

        Raises:
            CoverageError: One is: there are not that many tokens.
        """
        for (stack, expert), lack in self.lacking().items():
            raise CoverageError(
                f"{stack}: expert {expert} has {self.minimum - lack} calibration tokens, {self.minimum} are wanted, "
                "and no more can be sent there",
                "raise --n-samples or --seq-len, or lower --min-expert-tokens",
            )

    def short_of(self, wanted: int) -> set[Expert]:
        """Return the experts to which the router sends fewer tokens than are wanted."""
        return {expert for expert, n in self.routed.items() if n < wanted}

    def events(self) -> list[str]:
        """Return a sentence for every stack and way in which experts were topped up."""
        out = []
        for counts, how in (
            (self.reserve, "further windows of the calibration text"),
            (self.forced, "calibration tokens the router sends elsewhere"),
        ):
            out += [
                f"{stack}: fewer than {self.minimum} tokens reach some experts; topped up from {how}, expert (tokens): "
                + experts
                for stack, experts in by_stack({expert: n for expert, n in counts.items() if n}).items()
            ]
        return out

    def metrics(self) -> dict[str, float]:
        """Return what the block's entry in the report says; empty without experts."""
        if not self.routed:
            return {}
        topped = [e for e in self.routed if self.reserve.get(e) or self.forced.get(e)]
        return {
            "expert_tokens_fewest": min(self.routed.values()),
            "expert_tokens_median": median(self.routed.values()),
            "expert_tokens_most": max(self.routed.values()),
            "experts_topped_up": len(topped),
        }


def by_stack(counts: Mapping[Expert, int]) -> dict[str, str]:
    """Return stack -> its experts and their counts, as text: `3 (17), 5 (0)`."""
    stacks: dict[str, list[str]] = {}
    for (stack, expert), n in sorted(counts.items()):
        stacks.setdefault(stack, []).append(f"{expert} ({n})")
    return {stack: ", ".join(experts) for stack, experts in stacks.items()}


class ForcedRouting:
    """Finds the calibration tokens that the router would have sent to an expert next.

    Args:
        lacking: Expert -> how many tokens it lacks.
        modules: Stack -> its module.
        routers: Stack -> its router.
    """

    def __init__(
        self, lacking: Mapping[Expert, int], modules: Mapping[str, nn.Module], routers: Mapping[str, Router]
    ) -> None:
        self._lacking, self._routers = lacking, routers
        self._modules = {stack: modules[stack] for stack in dict.fromkeys(stack for stack, _ in lacking)}
        self._best: dict[Expert, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look at every forward pass inside the `with`."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> dict[Expert, Tensor]:
        """Return expert -> rows `[tokens, hidden]`, best first."""
        return {expert: rows for expert, (_, rows) in self._best.items()}

    def _hook(self, stack: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, indices = args[0].detach(), args[1]
            shares = self._routers[stack](hidden)  # [tokens, experts]
            for (name, expert), lack in self._lacking.items():
                if name != stack:
                    continue
                free = ~(indices == expert).any(-1)
                likes, rows = shares[free, expert], hidden[free]
                if (known := self._best.get((stack, expert))) is not None:
                    likes, rows = torch.cat([known[0], likes]), torch.cat([known[1], rows])
                order = likes.argsort(descending=True, stable=True)[:lack]
                self._best[stack, expert] = likes[order], rows[order]

        return hook
