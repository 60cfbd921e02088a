"""AdaRound: learn for every weight whether it rounds down or up; the grid stays fixed.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML, arXiv 2004.10568, section 3, on
the block-by-block loop of BRECQ, whose settings are the defaults. With `s` the step and `V` one variable per weight:

    h(V) = clamp(sigmoid(V) * 1.2 - 0.1, 0, 1)
    What = s * clamp(floor(W / s) + h(V), lo, hi)
    loss = reconstruction + lambda * sum(1 - |2 h(V) - 1|^beta)

It starts at `h = frac(W / s)`. `beta` falls from 20 to 2 after a warm-up in which the second term is off; it pushes `h`
to 0 or 1. In the end weights with `V >= 0` go up, the others down.

Learned with the soft `What`, so what is measured on the way is the loss of values that no code has yet.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.stats import Statistic
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QParams, QuantFormat, grouped
from compressor.formats.ints import IntFormat
from compressor.methods.base import Block, Layer, Scope, Stream
from compressor.methods.grids import clamped
from compressor.methods.learning import LearningOptions
from compressor.methods.reconstruction import learn
from compressor.methods.scaled import Scaled
from compressor.methods.starts import from_grid
from compressor.plan import WeightRef

_LOW, _HIGH = -0.1, 1.1
"""The sigmoid is stretched to this range and cut to 0 to 1, so that it can reach both ends."""


class AdaRoundOptions(LearningOptions):
    """Options of AdaRound."""

    start: Literal["mse", "minmax"] = Field("mse", description="grid: mse (clipped) or minmax")
    lr: float | None = Field(None, gt=0, le=10, description="learning rate of V; if unset 10 / iterations")
    regularizer: float = Field(10.0, ge=0, description="lambda, in units of the reconstruction loss at the start")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the iterations without that term")
    beta_start: float = Field(20.0, gt=0, description="beta at the end of the warm-up")
    beta_end: float = Field(2.0, gt=0, description="beta at the end")


class AdaRound(Scaled):
    """Rounding up or down, learned."""

    name = "adaround"
    summary = "AdaRound: learn for each weight whether it rounds up or down, block by block; integers"
    scope = Scope.BLOCK
    stream = Stream.BOTH
    Options = AdaRoundOptions
    options: AdaRoundOptions

    def __init__(self, options: AdaRoundOptions | None = None) -> None:
        self.options = options or AdaRoundOptions()

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return what factors are chosen by: the loss is that of the block itself."""
        return self.with_factor_stats((), fmt)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse grids that are not evenly spaced: `floor` and `floor + 1` must be neighbours."""
        if not isinstance(fmt, IntFormat):
            return f"method adaround rounds to integers, which {fmt.name} does not store"
        return None

    def solve_block(self, block: Block, generator: torch.Generator) -> Outcome:
        """Learn all roundings of the block together."""

        def start(layer: Layer, fmt: QuantFormat) -> UpOrDown:
            assert isinstance(fmt, IntFormat)
            return UpOrDown(*from_grid(layer, fmt, self.options.start == "mse"), fmt, self.options)

        return learn(block, start, self.options, generator)


class UpOrDown:
    """The variables of one weight."""

    def __init__(self, layer: Layer, q: QParams, fmt: IntFormat, options: AdaRoundOptions) -> None:
        self.fmt, self.q, self.options = fmt, q, options
        self.steps = fmt.steps(q)  # [out, groups, 1]
        z = grouped(layer.weight, fmt.group_size) / self.steps
        self.floor = z.floor()  # [out, groups, group]
        share = (z - self.floor - _LOW) / (_HIGH - _LOW)
        self.v = share.logit()
        # V travels about 5 from one end to the other, whatever the number of steps, and rates average half their start.
        rate = 10 / max(options.steps(fmt.bits), 100) if options.lr is None else options.lr
        self.groups = [(self.v, rate)]

    @property
    def exponent(self) -> None:
        """Integers have none."""
        return

    def value(self) -> Tensor:
        """Return the soft `What`, float32 `[out, in]`."""
        return self._clamped(self.floor + self._h()).mul_(self.steps).flatten(-2)

    def rounded(self) -> Tensor:
        """Return what is stored: `h` is 1 where `V >= 0` and 0 elsewhere, float32 `[out, in]`."""
        return self._clamped(self.floor + (self.v >= 0)).mul_(self.steps).flatten(-2)

    def backward(self, gradient: Tensor, progress: float) -> None:
        """Set the gradient of `V`: of the reconstruction, and after the warm-up of the term that ends in 0 or 1."""
        sigmoid, h = self.v.sigmoid(), self._h()
        low, high = self.fmt.reach(self.q)
        z = self.floor + h
        slope = sigmoid * (1 - sigmoid) * (_HIGH - _LOW) * ((h > 0) & (h < 1))
        own = grouped(gradient, self.fmt.group_size) * self.steps * ((z >= low) & (z <= high))
        done = (progress - self.options.warmup) / (1 - self.options.warmup)
        if done > 0:
            beta = self.options.beta_end + (self.options.beta_start - self.options.beta_end) * (1 - done)
            away = 2 * h - 1
            own -= self.options.regularizer * 2 * beta * away.abs().pow(beta - 1) * away.sign()
        self.v.grad = own * slope

    def quantized(self) -> Quantized:
        """Return codes and grid."""
        return Quantized(self.fmt.encode(self.rounded(), self.q), self.q)

    def _h(self) -> Tensor:
        return (self.v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp_(0, 1)

    def _clamped(self, z: Tensor) -> Tensor:
        low, high = self.fmt.reach(self.q)
        return clamped(z, low + 0.5, high - 0.5)
