"""Statistics of a layer's input, streamed over calibration samples.

Samples are dealt into a fixed number of lanes; each lane is summed on its own and lanes are added in order. The result
then depends on the samples alone, not on how many processes shared the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 8
"""Number of partial sums. Fixed for good: changing it changes results in the last bit."""


def lane_of(sample: int, n_samples: int) -> int:
    """Return the lane a sample belongs to: lanes are contiguous and as equal as possible."""
    return sample * min(LANES, n_samples) // n_samples


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


class SecondMomentSum:
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
            self._lane.addmm_(x.T, x)
        else:
            blocks = x.unflatten(1, (-1, self.spec.block)).transpose(0, 1)  # [blocks, tokens, block]
            self._lane.baddbmm_(blocks.transpose(1, 2), blocks)

    def close_lane(self) -> None:
        """Add the open lane to the total; called once per lane, in lane order."""
        self._total += self._lane
        self._lane.zero_()

    def value(self) -> Tensor:
        """Return `sum x x^T`, `[in, in]` or `[in/block, block, block]`, float32; all lanes must be closed."""
        return self._total
