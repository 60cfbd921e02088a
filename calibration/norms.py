"""The squared norm of every channel of a layer's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration.stats import Unshifted


@dataclass(frozen=True)
class SquareSum:
    """Asks for `sum x^2` over tokens, per channel."""

    def start(self, in_features: int, device: torch.device) -> SquareSumOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return SquareSumOf(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers in one sum."""
        return in_features


class SquareSumOf(Unshifted):
    """Accumulates `sum x^2` in float32, whatever the dtype of `x`.

    Attributes:
        n_tokens: Rows seen so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._total = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._lane = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)
        self.n_tokens = 0

    @property
    def max_abs(self) -> float:
        """Largest input magnitude seen; NaN once a NaN was seen."""
        return float(self._largest)

    def update(self, x: Tensor) -> None:
        """Add rows `x` `[tokens, in]` to the open lane."""
        if x.shape[0] == 0:
            return
        x = x.float()
        self.n_tokens += x.shape[0]
        self._largest = torch.maximum(self._largest, x.abs().max())
        self._lane += x.square().sum(0)

    def close_lane(self) -> None:
        """Add the open lane to the total."""
        self._total += self._lane
        self._lane.zero_()

    def value(self) -> Tensor:
        """Return `sum x^2`, float32 `[in]`."""
        return self._total

    def divide(self, c: Tensor) -> None:
        """Turn `sum x^2` into that of `x / c`."""
        self._total /= c.square()
