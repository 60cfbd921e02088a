"""FlexRound: learn, by element-wise division, which code every weight takes, together with the grid.

Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization", ICML,
arXiv 2306.00317, section 3. For a linear weight `W` `[out, in]`:

    W' = W / (S2 * s3)              one divisor per weight, one per output channel; of a convolution
                                    `[out, in, height, width]` also s4, one per input channel
    What = s1 * clamp(round(W' / s1), lo, hi)

`s1` is the grid size (per tensor, channel or group, as the format has it). All three are learned as logarithms, so a
step of the optimizer is a relative change. The gradient passes rounding as if it were not there and stops where codes
saturate: with `G` the gradient in `What` and `m` one inside the grid,

    d log S2 = -G * m * W'          d log s3, s4 = its sums          d log s1 = sum over the group of G * (What - m W')

A weight may move by several codes; weights of larger magnitude move further.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QParams, QuantFormat, ScaledFormat, grouped
from compressor.methods.base import Block, Layer, Scope, Stream
from compressor.methods.grids import clamped
from compressor.methods.learning import LearningOptions
from compressor.methods.reconstruction import learn
from compressor.methods.scaled import Scaled
from compressor.methods.starts import Start, from_gptq, from_grid
from compressor.plan import Kind, WeightRef


class FlexRoundOptions(LearningOptions):
    """Options of FlexRound."""

    start: Start | None = Field(
        None,
        description="before learning: a grid, mse (clipped) or minmax; or what gptq makes of the layers; if unset gptq "
        "at 2 bits, else mse",
    )
    lr: float | None = Field(None, ge=0, le=1, description="learning rate of the logarithms; if unset 0.16 / 2**bits")
    lr_scale: float | None = Field(None, ge=0, le=1, description="learning rate of the grid size; lr if unset")
    row_divisor: bool = Field(True, description="learn s3, one divisor per output channel")
    channel_divisor: bool = Field(True, description="convolutions: learn s4, one divisor per input channel")

    def begin(self, bits: int) -> Start:
        """Return `start`, or what it is for weights of these bits if unset."""
        return self.start or ("gptq" if bits == 2 else "mse")


class FlexRound(Scaled):
    """Rounding learned by element-wise division."""

    name = "flexround"
    summary = "FlexRound: learn each weight's rounding and the grid, block by block"
    scope = Scope.BLOCK
    stream = Stream.BOTH
    Options = FlexRoundOptions
    options: FlexRoundOptions

    def __init__(self, options: FlexRoundOptions | None = None) -> None:
        self.options = options or FlexRoundOptions()

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the second moment if GPTQ makes the start, and what factors are chosen by."""
        moments = (SecondMoment(),) if self.options.begin(fmt.bits) == "gptq" else ()
        return self.with_factor_stats(moments, fmt)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats whose grid does not stretch with a step."""
        if not isinstance(fmt, ScaledFormat):
            return f"method flexround learns the step of a grid, which {fmt.name} does not have"
        return None

    def solve_block(self, block: Block, generator: torch.Generator) -> Outcome:
        """Learn all roundings of the block together."""
        begins = [(layer, fmt, self.options.begin(fmt.bits)) for layer, fmt in block.layers]
        starts, events = from_gptq([(layer, fmt) for layer, fmt, begin in begins if begin == "gptq"], generator)
        for layer, fmt, begin in begins:
            if begin != "gptq":
                starts[layer.ref.name] = from_grid(layer, fmt, clip=begin == "mse")

        def start(layer: Layer, fmt: QuantFormat) -> Division:
            assert isinstance(fmt, ScaledFormat)
            return Division(*starts[layer.ref.name], fmt, self.options)

        outcome = learn(block, start, self.options, generator)
        return replace(outcome, events=(*events, *outcome.events))


class Division:
    """The variables of one weight, as logarithms.

    Args:
        layer: The layer, with the weight it starts from.
        q: The grid it starts from.
        fmt: Its format.
        options: Learning rates.
    """

    def __init__(self, layer: Layer, q: QParams, fmt: ScaledFormat, options: FlexRoundOptions) -> None:
        self.weight, self.fmt, self.q = layer.weight, fmt, q
        step = fmt.steps(q)  # s1 [out, groups, 1]
        self.log_step, self.side = step.abs().log(), step.sign()  # a grid that is mirrored stays so
        self.log_divisor = torch.zeros_like(layer.weight)  # S2 [out, in]
        self.log_row = torch.zeros_like(layer.weight[:, :1])  # s3 [out, 1]
        channels = layer.ref.shape[1] if layer.ref.kind is Kind.CONV and options.channel_divisor else 0
        self.log_channel = layer.weight.new_zeros(channels, 1)  # s4 [in channels, 1], of convolutions alone
        # Neighbouring codes are further apart, as a ratio, the fewer there are.
        rate = 0.16 / 2**fmt.bits if options.lr is None else options.lr
        self.groups = [(self.log_divisor, rate)]
        scale_rate = rate if options.lr_scale is None else options.lr_scale
        if scale_rate:
            self.groups.append((self.log_step, scale_rate))
        if options.row_divisor:
            self.groups.append((self.log_row, rate))
        if channels:
            self.groups.append((self.log_channel, rate))
        self._last: tuple[Tensor, Tensor, QParams] | None = None

    @property
    def exponent(self) -> float | None:
        """The exponent of a grid of powers, which is not learned here."""
        return None if self.q.exponent is None else float(self.q.exponent)

    def value(self) -> Tensor:
        """Return `What`, float32 `[out, in]`, and keep what `backward` needs."""
        q, divided = self.params(), self.divided()
        value = self.fmt.round(divided, q)
        self._last = divided, value.detach(), q  # the caller may ask for a gradient in `value`, not in what is kept
        return value

    def rounded(self) -> Tensor:
        """Return `What`, float32 `[out, in]`."""
        return self.fmt.round(self.divided(), self.params())

    def backward(self, gradient: Tensor, progress: float) -> None:
        """Set the gradients of the logarithms; see the top of this file."""
        assert self._last is not None, "value() comes first"
        divided, value, q = self._last
        z = grouped(divided, self.fmt.group_size) / self.fmt.steps(q)  # [out, groups, group]
        inside = clamped(z, *self.fmt.reach(q)).eq_(z).flatten(-2)  # 1 or 0
        pull = inside.mul_(divided).mul_(gradient)
        moved = grouped(value.mul_(gradient).sub_(pull), self.fmt.group_size).sum(-1, keepdim=True)  # [out, groups, 1]
        self.log_step.grad = moved.sum_to_size(self.log_step.shape)
        self.log_divisor.grad = pull.neg_()
        self.log_row.grad = pull.sum(1, keepdim=True)
        if len(self.log_channel):
            self.log_channel.grad = pull.unflatten(1, (len(self.log_channel), -1)).sum((0, 2)).unsqueeze(1)
        self._last = None

    def quantized(self) -> Quantized:
        """Return codes and grid."""
        q = self.params()
        return Quantized(self.fmt.encode(self.divided(), q), q)

    def divided(self) -> Tensor:
        """Return `W'`, float32 `[out, in]`."""
        exponent = torch.sub(self.log_row.neg(), self.log_divisor)
        if len(self.log_channel):
            exponent.unflatten(1, (len(self.log_channel), -1)).sub_(self.log_channel)
        return exponent.exp_().mul_(self.weight)

    def params(self) -> QParams:
        """Return the grid in stored precision."""
        return self.fmt.with_steps(self.q, self.log_step.exp().mul_(self.side))
