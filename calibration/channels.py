"""Statistics of a layer's input per channel: how loud, how far, around what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.calibration.stats import Laned, Part, Unshifted, largest


@dataclass(frozen=True)
class MeanAbs:
    """Asks for the mean of `|x|` over tokens, per channel: how loud a channel usually is."""

    def start(self, in_features: int, device: torch.device) -> MeanAbsSum:
        """Return an empty accumulator for inputs of width `in_features`."""
        return MeanAbsSum(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers in one sum; they are float64."""
        return 2 * in_features


class _ChannelSum(Laned, Unshifted):
    """Sums one number per token and channel.

    Attributes:
        n_tokens: Rows seen so far.
        max_abs: Largest input magnitude seen; NaN once a NaN was seen.
    """

    dtype: ClassVar[torch.dtype]

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._total = torch.zeros(in_features, dtype=self.dtype, device=device)
        self._lane = torch.zeros(in_features, dtype=self.dtype, device=device)
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
        self._lane += self._summand(magnitudes).sum(0, dtype=self.dtype)

    def parts(self, keep: bool) -> tuple[Part, ...]:
        """Return the sums of the open lane."""
        return (Part(self._lane, self._total if keep else None, Tensor.add_),)

    def empty_lane(self) -> None:
        """Open the next lane."""
        self._lane.zero_()

    def tally(self) -> tuple[float, ...]:
        """Return the rows and the largest magnitude."""
        return float(self.n_tokens), self.max_abs

    def count(self, tallies: Sequence[tuple[float, ...]]) -> None:
        """Replace this process's tally by that of all."""
        self.n_tokens = int(sum(tally[0] for tally in tallies))
        self._largest.fill_(largest(tally[1] for tally in tallies))

    def _summand(self, magnitudes: Tensor) -> Tensor:
        """Return what is summed, given `|x|` `[tokens, in]`."""
        raise NotImplementedError


class MeanAbsSum(_ChannelSum):
    """Accumulates `sum |x|` in float64."""

    dtype = torch.float64

    def value(self) -> Tensor:
        """Return the mean of `|x|`, float32 `[in]`; zeros if there were no tokens."""
        return (self._total / max(self.n_tokens, 1)).float()

    def divide(self, c: Tensor) -> None:
        """Turn the mean of `|x|` into that of `|x / c|`; `max_abs` stays that of the inputs seen."""
        self._total /= c

    def _summand(self, magnitudes: Tensor) -> Tensor:
        return magnitudes


@dataclass(frozen=True)
class SquareSum:
    """Asks for `sum x^2` over tokens, per channel: the squared norm of every channel."""

    def start(self, in_features: int, device: torch.device) -> SquareSumOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return SquareSumOf(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers in one sum."""
        return in_features


class SquareSumOf(_ChannelSum):
    """Accumulates `sum x^2` in float32, whatever the dtype of `x`."""

    dtype = torch.float32

    def value(self) -> Tensor:
        """Return `sum x^2`, float32 `[in]`."""
        return self._total

    def divide(self, c: Tensor) -> None:
        """Turn `sum x^2` into that of `x / c`."""
        self._total /= c.square()

    def _summand(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.square()


@dataclass(frozen=True)
class MaxAbs:
    """Asks for the largest `|x|` over tokens, per channel: what a quantizer of the input would have to cover."""

    def start(self, in_features: int, device: torch.device) -> MaxAbsOf:
        """Return an empty accumulator for inputs of width `in_features`."""
        return MaxAbsOf(in_features, device)

    def size(self, in_features: int) -> int:
        """Return the numbers it holds."""
        return in_features


class MaxAbsOf(Laned, Unshifted):
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

    def parts(self, keep: bool) -> tuple[Part, ...]:
        """Return the maxima: lanes and total are one, as a value may join any number of times."""
        return (Part(self._largest, self._largest if keep else None, _raise),)

    def empty_lane(self) -> None:
        """Do nothing."""

    def tally(self) -> tuple[float, ...]:
        """Return the rows."""
        return (float(self.n_tokens),)

    def count(self, tallies: Sequence[tuple[float, ...]]) -> None:
        """Replace this process's tally by that of all."""
        self.n_tokens = int(sum(tally[0] for tally in tallies))

    def value(self) -> Tensor:
        """Return the largest `|x|`, float32 `[in]`."""
        return self._largest

    def divide(self, c: Tensor) -> None:
        """Turn the maximum of `|x|` into that of `|x / c|`."""
        self._largest = self._largest / c


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


class ChannelRangeOf(Laned):
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

    def parts(self, keep: bool) -> tuple[Part, ...]:
        """Return the sum of the open lane, and the ends, which are those of the total too."""
        low, high = (self._low, self._high) if keep else (None, None)
        return (
            Part(self._lane, self._middles if keep else None, Tensor.add_),
            Part(self._low, low, _lower),
            Part(self._high, high, _raise),
        )

    def empty_lane(self) -> None:
        """Open the next lane."""
        self._lane.zero_()

    def tally(self) -> tuple[float, ...]:
        """Return the rows and the samples."""
        return float(self.n_tokens), float(self._n_samples)

    def count(self, tallies: Sequence[tuple[float, ...]]) -> None:
        """Replace this process's tally by that of all."""
        self.n_tokens, self._n_samples = (int(sum(column)) for column in zip(*tallies, strict=True))

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


def _raise(total: Tensor, values: Tensor) -> None:
    """Raise a total to values that are larger; both keep a NaN."""
    torch.maximum(total, values, out=total)


def _lower(total: Tensor, values: Tensor) -> None:
    """Lower a total to values that are smaller; both keep a NaN."""
    torch.minimum(total, values, out=total)
