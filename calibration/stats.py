"""Statistics of a layer's input, streamed over calibration samples.

Samples are dealt into a fixed number of lanes; each lane is summed on its own and lanes are added in order. The result
then depends on the samples alone, not on how many processes shared the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LANES = 8
"""Number of partial sums. Fixed for good: changing it changes results in the last bit."""

BANDS = 5
"""Bands that half of a symmetric matrix is computed in."""


def lane_of(sample: int, n_samples: int) -> int:
    """Return the lane a sample belongs to: lanes are contiguous and as equal as possible."""
    return sample * min(LANES, n_samples) // n_samples


def samples_of(lane: int, n_samples: int) -> range:
    """Return the samples of a lane."""
    lanes = min(LANES, n_samples)
    first, behind = (-(-edge * n_samples // lanes) for edge in (lane, lane + 1))
    return range(first, behind)


class Accumulator(Protocol):
    """What sums one statistic of one layer's input.

    Attributes:
        n_tokens: Rows seen so far.
    """

    n_tokens: int

    @property
    def max_abs(self) -> float:
        """Largest input magnitude seen; NaN once a NaN was seen."""
        ...

    def update(self, x: Tensor) -> None:
        """Add rows `x` `[tokens, in]` to the open lane."""
        ...

    def close_lane(self) -> None:
        """Add the open lane to the total; called once per lane, in lane order."""
        ...

    def value(self) -> Tensor:
        """Return the statistic, float32; all lanes must be closed."""
        ...

    def divide(self, c: Tensor) -> None:
        """Turn the statistic of `x` into that of `x / c`, for positive factors `c` `[in]`; all lanes must be closed."""
        ...

    def subtract(self, z: Tensor) -> None:
        """Turn the statistic of `x` into that of `x - z` `[in]`; all lanes must be closed.

        Raises:
            NotImplementedError: It does not know enough for that.
        """
        ...


class Statistic(Protocol):
    """Asks for a statistic; equal requests are answered by one accumulator, so implementations are hashable."""

    def start(self, in_features: int, device: torch.device) -> Accumulator:
        """Return an empty accumulator for inputs of width `in_features`."""
        ...

    def size(self, in_features: int) -> int:
        """Return how many float32 numbers an accumulator holds for each of its total and its open lane."""
        ...


@dataclass(frozen=True)
class Part:
    """Numbers of an open lane, and how they join the total.

    Attributes:
        lane: What the open lane holds.
        total: What they join, in the same shape; None in a process that does not keep the total.
        join: Changes a part of the total in place, given the same part of a lane.
    """

    lane: Tensor
    total: Tensor | None
    join: Callable[[Tensor, Tensor], object]


class Laned:
    """Base of accumulators whose lanes may be filled by different processes.

    Lanes are exchanged as they are closed; what counts rows (`tally`) once, when all samples have passed.
    """

    n_tokens: int

    def parts(self, keep: bool) -> tuple[Part, ...]:
        """Return what the open lane holds, finished; with totals if this process keeps them."""
        raise NotImplementedError

    def empty_lane(self) -> None:
        """Open the next lane: forget what this one held."""
        raise NotImplementedError

    def close_lane(self) -> None:
        """Add the open lane to the total."""
        for part in self.parts(keep=True):
            assert part.total is not None
            part.join(part.total, part.lane)
        self.empty_lane()

    def tally(self) -> tuple[float, ...]:
        """Return the rows and the largest magnitude this process has seen, and what else it counts."""
        raise NotImplementedError

    def count(self, tallies: Sequence[tuple[float, ...]]) -> None:
        """Replace this process's tally by that of all."""
        raise NotImplementedError


class Unshifted:
    """Base of accumulators that do not tell what a shift of their inputs would make of them."""

    def subtract(self, z: Tensor) -> None:
        """Raise."""
        raise NotImplementedError(f"{type(self).__name__} cannot be shifted")


@dataclass(frozen=True)
class SecondMoment:
    """Asks for `sum x x^T` over tokens: the curvature of a linear layer's output error in its weights.

    Attributes:
        block: Width of the diagonal blocks to keep, or None for the whole `[in, in]` matrix. Blocks cost
            `in * block` numbers instead of `in * in`.
    """

    block: int | None = None

    def start(self, in_features: int, device: torch.device) -> SecondMomentSum:
        """Return an empty accumulator for inputs of width `in_features`."""
        return SecondMomentSum(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers in one sum."""
        return in_features * (self.block or in_features)


class SecondMomentSum(Laned, Unshifted):
    """Accumulates `sum x x^T` in float32.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, spec: SecondMoment, in_features: int, device: torch.device) -> None:
        self.spec = spec
        self._shape = (
            (in_features, in_features) if spec.block is None else (in_features // spec.block, spec.block, spec.block)
        )
        self._device = device
        # Gigabytes for wide layers: each is there while it is needed, and a process may need only one of them.
        self._sum: Tensor | None = None
        self._open: Tensor | None = None
        self.n_tokens = 0
        self.max_abs = 0.0

    @property
    def _total(self) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._sum

    @property
    def _lane(self) -> Tensor:
        if self._open is None:
            self._open = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._open

    def update(self, x: Tensor) -> None:
        """Add rows `x` `[tokens, in]` to the open lane."""
        if x.shape[0] == 0:
            return
        x = x.float()
        self.n_tokens += x.shape[0]
        self.max_abs = largest((self.max_abs, float(x.abs().max())))
        if self.spec.block is None:
            for rows in self._bands():
                self._lane[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        else:
            blocks = x.unflatten(1, (-1, self.spec.block)).transpose(0, 1)  # [blocks, tokens, block]
            self._lane.baddbmm_(blocks.transpose(1, 2), blocks)

    def close_lane(self) -> None:
        """Add the open lane to the total; called once per lane, in lane order."""
        if self._open is not None:  # an expert that no token reached in this lane adds nothing
            super().close_lane()

    def parts(self, keep: bool) -> tuple[Part, ...]:
        """Return the open lane, both halves filled."""
        if self.spec.block is None:
            for rows in self._bands():
                self._lane[rows.stop :, rows] = self._lane[rows, rows.stop :].T
        return (Part(self._lane, self._total if keep else None, Tensor.add_),)

    def empty_lane(self) -> None:
        """Open the next lane; its memory is there again from its first sample on."""
        self._open = None

    def tally(self) -> tuple[float, ...]:
        """Return the rows and the largest magnitude."""
        return float(self.n_tokens), self.max_abs

    def count(self, tallies: Sequence[tuple[float, ...]]) -> None:
        """Replace this process's tally by that of all."""
        self.n_tokens = int(sum(tally[0] for tally in tallies))
        self.max_abs = largest(tally[1] for tally in tallies)

    def _bands(self) -> Iterator[slice]:
        """Yield the rows of a whole matrix in bands; right of its diagonal block, a band is also a band of columns.

        Computing each only from there on saves two fifths of the work.
        """
        width = -(-self._shape[0] // BANDS)
        for first in range(0, self._shape[0], width):
            yield slice(first, min(first + width, self._shape[0]))

    def value(self) -> Tensor:
        """Return `sum x x^T`, `[in, in]` or `[in/block, block, block]`, float32; all lanes must be closed."""
        return self._total

    def divide(self, c: Tensor) -> None:
        """Turn `sum x x^T` into that of `x / c`; `max_abs` stays that of the inputs seen."""
        if self.spec.block is None:
            self._total.div_(c.unsqueeze(1)).div_(c)
        else:
            parts = c.unflatten(0, (-1, self.spec.block))  # [blocks, block]
            self._total.div_(parts.unsqueeze(2)).div_(parts.unsqueeze(1))


def largest(values: Iterable[float]) -> float:
    """Return the largest of some magnitudes; NaN if one is."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)
