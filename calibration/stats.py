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

    def subtract(self, z: Tensor) -> None:
        """Raise: this sum does not tell what a shift would make of it."""
        raise NotImplementedError(f"{type(self).__name__} cannot be shifted")


@dataclass(frozen=True)
class MeanAbs:
    """Asks for the mean of `|x|` over tokens, per channel: how loud a channel usually is."""

    def start(self, in_features: int, device: torch.device) -> MeanAbsSum:
        """Return an empty accumulator for inputs of width `in_features`."""
        return MeanAbsSum(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers in one sum; they are float64."""
        return 2 * in_features


class MeanAbsSum:
    """Accumulates `sum |x|` in float64.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._lane = torch.zeros(in_features, dtype=torch.float64, device=device)
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
        magnitudes = x.float().abs()
        self.n_tokens += x.shape[0]
        self._largest = torch.maximum(self._largest, magnitudes.max())
        self._lane += magnitudes.sum(0, dtype=torch.float64)

    def close_lane(self) -> None:
        """Add the open lane to the total."""
        self._total += self._lane
        self._lane.zero_()

    def value(self) -> Tensor:
        """Return the mean of `|x|`, float32 `[in]`; zeros if there were no tokens."""
        return (self._total / max(self.n_tokens, 1)).float()

    def divide(self, c: Tensor) -> None:
        """Turn the mean of `|x|` into that of `|x / c|`; `max_abs` stays that of the inputs seen."""
        self._total /= c

    def subtract(self, z: Tensor) -> None:
        """Raise: this sum does not tell what a shift would make of it."""
        raise NotImplementedError(f"{type(self).__name__} cannot be shifted")


@dataclass(frozen=True)
class MaxAbs:
    """Asks for the largest `|x|` over tokens, per channel: what a quantizer of the input would have to cover."""

    def start(self, in_features: int, device: torch.device) -> MaxAbsOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return MaxAbsOf(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return in_features


class MaxAbsOf:
    """Keeps the largest `|x|` of every channel; a maximum needs no lanes.

    Attributes:
        n_tokens: Rows seen so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._largest = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.n_tokens = 0

    @property
    def max_abs(self) -> float:
        """Largest input magnitude seen; NaN once a NaN was seen."""
        return float(self._largest.max())

    def update(self, x: Tensor) -> None:
        """Take rows `x` `[tokens, in]` into account."""
        if x.shape[0] == 0:
            return
        self.n_tokens += x.shape[0]
        self._largest = torch.maximum(self._largest, x.float().abs().amax(0))  # both keep a NaN

    def close_lane(self) -> None:
        """Do nothing: the order of samples does not matter."""

    def value(self) -> Tensor:
        """Return the largest `|x|`, float32 `[in]`."""
        return self._largest

    def divide(self, c: Tensor) -> None:
        """Turn the maximum of `|x|` into that of `|x / c|`."""
        self._largest = self._largest / c

    def subtract(self, z: Tensor) -> None:
        """Raise: this sum does not tell what a shift would make of it."""
        raise NotImplementedError(f"{type(self).__name__} cannot be shifted")


@dataclass(frozen=True)
class ChannelRange:
    """Asks for the range of every channel: its middle and its ends.

    Attributes:
        cut: Values beyond this share of a sample's own smallest and largest one count as that much.
    """

    cut: float = 1.0

    def start(self, in_features: int, device: torch.device) -> ChannelRangeOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return ChannelRangeOf(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds, of which half are float64."""
        return 3 * in_features


class ChannelRangeOf:
    """Keeps the smallest and the largest value of every channel, and sums the middle of each sample's range.

    Every call of `update` is one sample. The sum is in float64; its rounding does not depend on the order that matters
    to anybody.

    Attributes:
        n_tokens: Rows seen so far.
    """

    def __init__(self, spec: ChannelRange, in_features: int, device: torch.device) -> None:
        self.spec = spec
        self._middles = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._lane = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._low = torch.full((in_features,), torch.inf, dtype=torch.float32, device=device)
        self._high = torch.full((in_features,), -torch.inf, dtype=torch.float32, device=device)
        self._n_samples = 0
        self.n_tokens = 0

    @property
    def max_abs(self) -> float:
        """Largest input magnitude seen; NaN once a NaN was seen."""
        return float(torch.maximum(-self._low, self._high).max()) if self.n_tokens else 0.0

    def update(self, x: Tensor) -> None:
        """Take one sample's rows `x` `[tokens, in]` into account."""
        if x.shape[0] == 0:
            return
        low, high = torch.aminmax(x.float(), dim=0)
        if self.spec.cut < 1:
            low = torch.maximum(low, low.min() * self.spec.cut).clamp(max=high.max() * self.spec.cut)
            high = torch.minimum(high, high.max() * self.spec.cut).clamp(min=low.min())
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._lane += (low.double() + high.double()) / 2
        self._n_samples += 1
        self.n_tokens += x.shape[0]

    def close_lane(self) -> None:
        """Add the open lane to the total."""
        self._middles += self._lane
        self._lane.zero_()

    def value(self) -> Tensor:
        """Return the mean middle, the smallest and the largest value, float32 `[3, in]`; zeros without tokens."""
        if not self._n_samples:
            return self._middles.new_zeros(3, len(self._middles), dtype=torch.float32)
        return torch.stack([(self._middles / self._n_samples).float(), self._low, self._high])

    def divide(self, c: Tensor) -> None:
        """Turn the ranges of `x` into those of `x / c`."""
        self._middles, self._low, self._high = self._middles / c, self._low / c, self._high / c

    def subtract(self, z: Tensor) -> None:
        """Turn the ranges of `x` into those of `x - z`."""
        self._middles = self._middles - self._n_samples * z.double()
        self._low, self._high = self._low - z, self._high - z


@dataclass(frozen=True)
class InputSample:
    """Asks for some of the inputs themselves: what a search runs the layer on.

    Attributes:
        n_rows: How many rows to keep, chosen evenly over all of them.
    """

    n_rows: int = 256

    def start(self, in_features: int, device: torch.device) -> InputSampleOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return InputSampleOf(self, in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return self.n_rows * in_features


class InputSampleOf:
    """Keeps the rows whose place in the stream draws the smallest numbers: the same ones however rows are batched.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    def __init__(self, spec: InputSample, in_features: int, device: torch.device) -> None:
        self.spec = spec
        self._rows = torch.zeros(0, in_features, dtype=torch.float32, device=device)
        self._draws = torch.zeros(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)
        self.n_tokens = 0
        self.max_abs = 0.0

    def update(self, x: Tensor) -> None:
        """Let rows `x` `[tokens, in]` take part."""
        if x.shape[0] == 0:
            return
        largest = float(x.abs().max())
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)
        self.n_tokens += x.shape[0]
        # One by one: a vectorized draw may depend on how many are drawn at once.
        new = torch.cat([torch.rand(1, dtype=torch.float64, generator=self._generator) for _ in range(x.shape[0])])
        draws = torch.cat([self._draws, new])
        kept = draws.argsort()[: self.spec.n_rows].sort().values
        self._rows = torch.cat([self._rows, x.float()])[kept.to(x.device)]
        self._draws = draws[kept]

    def close_lane(self) -> None:
        """Do nothing: rows are no sum."""

    def value(self) -> Tensor:
        """Return the rows in the order they came, float32 `[rows, in]`."""
        return self._rows

    def divide(self, c: Tensor) -> None:
        """Turn the rows of `x` into those of `x / c`."""
        self._rows = self._rows / c

    def subtract(self, z: Tensor) -> None:
        """Turn the rows of `x` into those of `x - z`."""
        self._rows = self._rows - z
