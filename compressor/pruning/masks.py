"""Which weights go, given a score for each: exact counts per matrix, per row, or N of every M inputs.

Where scores are equal the weight with the lower index goes first in whole matrices and rows, and stays in patterns.
NaN counts as a score of zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import RecipeError

LARGEST_GROUP = 32
"""Largest M of a pattern N:M."""


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: N kept of every M consecutive inputs of a row.

    Attributes:
        keep: N.
        of: M.
    """

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `2:4`.

        Raises:
            RecipeError: Not two numbers, or N is not between 1 and M - 1, or M does not divide 32.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not found:
            raise RecipeError(f"pattern {text!r} is not N:M", "for example 2:4: keep 2 of every 4 inputs")
        keep, of = int(found[1]), int(found[2])
        if not 0 < keep < of or LARGEST_GROUP % of:
            raise RecipeError(
                f"pattern {text}: keeps {keep} of every {of} inputs, but needs 1 <= N < M and an M that divides "
                f"{LARGEST_GROUP}",
                "use 2:4 or 4:8",
            )
        return cls(keep, of)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def sparsity(self) -> float:
        """Share of weights that become zero."""
        return 1 - self.keep / self.of

    def choose(self, scores: Tensor) -> Tensor:
        """Return the mask `[..., in]` of the N largest scores in every group of M."""
        groups = clean(scores).unflatten(-1, (-1, self.of))
        best = groups.sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
        return keep.flatten(-2)

    def fits(self, keep: Tensor) -> bool:
        """Return whether a mask `[out, in]` keeps N of every M inputs."""
        return bool((keep.unflatten(-1, (-1, self.of)).sum(-1) == self.keep).all())


def keep_per_tensor(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask without the `round(numel * sparsity)` smallest scores of the whole matrix."""
    return without_smallest(scores.reshape(1, -1), round(scores.numel() * sparsity)).view(scores.shape)


def keep_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask without the `int(in * sparsity)` smallest scores of every row of `[out, in]`."""
    return without_smallest(scores, int(scores.shape[1] * sparsity + 1e-9))


def without_smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask `[rows, columns]` that is False at the `count` smallest scores of every row."""
    order = clean(scores).argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def clean(scores: Tensor) -> Tensor:
    """Return scores with NaN replaced by zero."""
    return scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
