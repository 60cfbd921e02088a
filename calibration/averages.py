"""Moving averages of each channel's range, sample by sample: what a channel usually reaches, not what it once did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MovingRange:
    """Asks for exponential moving averages, over samples, of every channel's largest and smallest value.

    Attributes:
        momentum: Share of the old average that stays; the first sample is the first average.
    """

    momentum: float = 0.9

    def start(self, in_features: int, device: torch.device) -> MovingRangeOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return MovingRangeOf(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return 2 * in_features


class MovingRangeOf:
    """Keeps the averages; samples come in their own order in every run.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, spec: MovingRange, in_features: int, device: torch.device) -> None:
        self.spec = spec
        self._ends = torch.zeros(2, in_features, dtype=torch.float32, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)
        self.n_tokens = 0

    @property
    def max_abs(self) -> float:
        """Largest input magnitude seen; NaN once a NaN was seen."""
        return float(self._largest)

    def update(self, x: Tensor) -> None:
        """Take one sample's rows `x` `[tokens, in]` into account."""
        if x.shape[0] == 0:
            return
        ends = torch.stack([x.float().amax(0), x.float().amin(0)])
        share = self.spec.momentum if self.n_tokens else 0.0
        self._ends = share * self._ends + (1 - share) * ends
        self._largest = torch.maximum(self._largest, ends.abs().max())
        self.n_tokens += x.shape[0]

    def close_lane(self) -> None:
        """Do nothing: averages of this kind have no lanes."""

    def value(self) -> Tensor:
        """Return the averages of the largest and the smallest value, float32 `[2, in]`."""
        return self._ends

    def divide(self, c: Tensor) -> None:
        """Turn the averages of `x` into those of `x / c`."""
        self._ends = self._ends / c

    def subtract(self, z: Tensor) -> None:
        """Turn the averages of `x` into those of `x - z`."""
        self._ends = self._ends - z
