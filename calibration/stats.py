"""Statistics of a layer's input, streamed over calibration samples.

Samples are dealt into a fixed number of lanes; each lane is summed on its own and lanes are added in order. The result
then depends on the samples alone, not on how many processes shared the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


class SecondMomentSum(Unshifted):
    """Accumulates `sum x x^T` in float32.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, spec: SecondMoment, in_features: int, device: torch.device) -> None:
        self.spec = spec
        shape = (
            (in_features, in_features) if spec.block is None else (in_features // spec.block, spec.block, spec.block)
        )
        self._total = torch.zeros(shape, dtype=torch.float32, device=device)
        self._lane = torch.zeros(shape, dtype=torch.float32, device=device)
        self.n_tokens = 0
        self.max_abs = 0.0

    def update(self, x: Tensor) -> None:
        """Add rows `x` `[tokens, in]` to the open lane."""
        if x.shape[0] == 0:
            return
        x = x.float()
        self.n_tokens += x.shape[0]
        largest = float(x.abs().max())
        # max() forgets a NaN that comes second and keeps one that comes first.
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)
        if self.spec.block is None:
            for rows in self._bands():
                self._lane[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        else:
            blocks = x.unflatten(1, (-1, self.spec.block)).transpose(0, 1)  # [blocks, tokens, block]
            self._lane.baddbmm_(blocks.transpose(1, 2), blocks)

    def close_lane(self) -> None:
        """Add the open lane to the total; called once per lane, in lane order."""
        if self.spec.block is None:
            for rows in self._bands():
                self._lane[rows.stop :, rows] = self._lane[rows, rows.stop :].T
        self._total += self._lane
        self._lane.zero_()

    def _bands(self) -> Iterator[slice]:
        """Yield the rows of a whole matrix in bands; right of its diagonal block, a band is also a band of columns.

        Computing each only from there on saves two fifths of the work.
        """
        width = -(-self._lane.shape[0] // BANDS)
        for first in range(0, self._lane.shape[0], width):
            yield slice(first, min(first + width, self._lane.shape[0]))

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
