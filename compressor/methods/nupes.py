"""NUPES: non-uniform grids of powers, with the exponent searched and then learned together with the weights' codes.

Yvinec et al. 2023, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", IEEE TPAMI 2025,
arXiv 2308.05600. Without data it is the search of `exponent.py` and rounding. With data, codes and exponent are
learned block by block on the loop of `reconstruction.py`. Per layer, with `m` the largest value of a group,
`Q = 2**(bits-1) - 1` and `e = 1 / a`:

    c    = clamp(round(V), -Q, Q)                   V: one latent code per weight, anywhere on the grid
    What = m * sign(c) * (|c| / Q)**e               e = exp(theta)
    dL/dV     = G * m * (e / Q) * (max(|c|, 1/2) / Q)**(e - 1)
    dL/dtheta = e * sum(G * What * ln(|c| / Q))     over c != 0
    dL/dln m  = sum of G * What over the group

What keeps it stable: `theta` instead of `a`, whose gradient would grow as 1 / a**2; `m` that does not move with the
exponent; a floor under `|c|` in the slope, which is zero or infinite at 0; `a` between 0.2 and 1; no exponent is
learned with 2 bits, where the grid does not depend on it.

The paper's text was not at hand: that codes move over the whole grid and that the exponent is learned too is what its
abstract states; loss, gradients, rates, and that `m` is learned too are this implementation's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Decision, Outcome, Quantized
from compressor.formats.base import QParams, QuantFormat, grouped
from compressor.formats.codebook import TINY
from compressor.formats.ints import IntFormat
from compressor.formats.power import LARGEST_EXPONENT, SMALLEST_EXPONENT, Power, as_integers, largest_integer, looked_up
from compressor.methods.base import Block, Layer, Scope, Stream
from compressor.methods.exponent import Objective, Part, best_exponent, search_exponent
from compressor.methods.gptq import GPTQ
from compressor.methods.grids import mse_clip
from compressor.methods.learning import LearningOptions
from compressor.methods.reconstruction import learn
from compressor.methods.scaled import Scaled
from compressor.methods.starts import Start
from compressor.plan import WeightRef

_LOG_STEEPEST = math.log(5)
"""Largest theta: exponents below 0.2 are far worse than integers."""


_INSIDE = 0.45
"""Codes that a latent code may be off the code it starts in."""

_ROWS = 1 << 14
"""Weights of every layer that an exponent for the whole network is searched on; all of them are held at once."""


class NupesOptions(LearningOptions):
    """Options of the search and of learning."""

    start: Start | None = Field(
        None,
        description="minmax: scales that cover all weights; mse: those of least rounding error; gptq: scales and codes "
        "of GPTQ; if unset gptq, and mse where nothing is learned",
    )
    learn: bool = Field(True, description="learn codes and exponent on calibration data; false: search the exponent")
    exponent: float | None = Field(
        None, ge=SMALLEST_EXPONENT, le=LARGEST_EXPONENT, description="use this exponent; searched if unset"
    )
    scope: Literal["layer", "network"] = Field(
        "layer", description="one exponent per layer, or one for the whole network, which is then not learned"
    )
    relative: bool = Field(False, description="scope=network: divide every layer's error by its size before the sum")
    rounding: Literal["nearest", "power"] = Field(
        "nearest", description="to the nearest value, or to the one whose power is nearest (as in the paper)"
    )
    lr: float = Field(0.01, ge=0, le=10, description="learning rate of the latent codes, in codes")
    lr_exponent: float = Field(2e-3, ge=0, le=1, description="learning rate of the exponent's logarithm; 0 fixes it")
    lr_scale: float | None = Field(
        None, ge=0, le=1, description="learning rate of the logarithm of m; if unset 0.16 / 2**bits; 0 fixes it"
    )
    bits: int | None = Field(
        None, ge=2, le=8, description="bits of the grid where the format stores integers (int8): see Idea"
    )

    @model_validator(mode="after")
    def _one_exponent(self) -> NupesOptions:
        if self.exponent is not None and self.scope == "network":
            raise ValueError("exponent is given, so scope=network has nothing to search")
        if self.start == "gptq" and not self.learn:
            raise ValueError("GPTQ needs calibration data, which learn=false does without")
        if self.scaling != "off" and not self.learn:
            raise ValueError("factors are chosen on calibration data, which learn=false does without")
        return self

    @property
    def begin(self) -> Start:
        """`start`, or what it is if unset."""
        return self.start or ("gptq" if self.learn else "mse")


class Nupes(Scaled):
    """Power grids, searched or learned."""

    name = "nupes"
    summary = "NUPES: grids of powers, exponent and codes learned block by block, or the exponent searched without data"
    Options = NupesOptions
    options: NupesOptions

    def __init__(self, options: NupesOptions | None = None) -> None:
        self.options = options or NupesOptions()
        self._shared: float | None = None

    @property
    def scope(self) -> Scope:
        """Whole blocks while learning, else layers."""
        return Scope.BLOCK if self.options.learn else Scope.LAYER

    @property
    def stream(self) -> Stream:
        """Both streams while learning, else none."""
        return Stream.BOTH if self.options.learn else Stream.NONE

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the second moment if GPTQ makes the start, and what factors are chosen by."""
        moments = (SecondMoment(),) if self.options.begin == "gptq" else ()
        return self.with_factor_stats(moments, fmt)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse what is no power grid, and integers that do not hold the powers asked for."""
        if isinstance(fmt, Power):
            return None if self.options.bits is None else f"{fmt.name} says how many bits: leave option bits out"
        if not isinstance(fmt, IntFormat) or not fmt.symmetric or self.options.bits is None:
            return f"method nupes needs a power grid (power2 ... power8), or int8 with option bits; not {fmt.name}"
        if fmt.dtype == torch.float16:
            return "method nupes writes integers with bfloat16 or float32 scales, and this checkpoint is float16"
        exponent = self.options.exponent
        largest = None if exponent is None else largest_integer(self.options.bits, exponent)
        if largest is None:
            return f"{fmt.name} holds powers whose exponent is one over a whole number: use option exponent=0.5"
        if largest > fmt.zero_code - 1:
            return f"powers up to {largest} do not fit in {fmt.name}: use fewer option bits"
        return None

    def survey(self, layers: Callable[[], Iterator[tuple[Layer, QuantFormat]]]) -> None:
        """Search the one exponent of a network on a few rows of every layer, if that is asked for."""
        if self.options.scope == "network":
            parts = [Part.of(layer.weight, self._grid(fmt), _ROWS) for layer, fmt in layers()]
            self._shared = search_exponent(parts, self._objective)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round one layer on the best grid."""
        grid = self._grid(fmt)
        start = self._start(layer, grid)
        codes = grid.encode_powers if self.options.rounding == "power" else grid.encode
        decision = Quantized(codes(layer.weight, start), start)
        return Outcome({layer.ref.name: _stored(decision, fmt)})

    def solve_block(self, block: Block, generator: torch.Generator) -> Outcome:
        """Learn codes and exponents of the block's layers together."""
        grids = replace(block, layers=tuple((layer, self._grid(fmt)) for layer, fmt in block.layers))
        first = _gptq(grids, generator) if self.options.begin == "gptq" else Outcome({})

        def start(layer: Layer, grid: QuantFormat) -> PowerCodes:
            assert isinstance(grid, Power)
            given = first.decisions.get(layer.ref.name)
            if isinstance(given, Quantized):
                return PowerCodes(layer.weight, grid, given.qparams, self.options, given.codes)
            return PowerCodes(layer.weight, grid, self._start(layer, grid), self.options)

        outcome = learn(grids, start, self.options, generator)
        formats = {layer.ref.name: fmt for layer, fmt in block.layers}
        stored = {name: _stored(decision, formats[name]) for name, decision in outcome.decisions.items()}
        return replace(outcome, decisions=stored, events=(*first.events, *outcome.events))

    @property
    def _objective(self) -> Objective:
        return Objective(self.options.rounding, self.options.begin != "minmax", self.options.relative)

    def _grid(self, fmt: QuantFormat) -> Power:
        """Return the power grid that is solved on: the format itself, or the one whose values an integer format holds.

        Where the exponent is given, or one was found for the network, it is that of the grid.
        """
        if isinstance(fmt, IntFormat):
            assert self.options.bits is not None, "refused otherwise"
            fmt = Power(self.options.bits, fmt.group_size, fmt.dtype, fmt.per_tensor)
        assert isinstance(fmt, Power), "refused otherwise"
        exponent = self._shared if self.options.exponent is None else self.options.exponent
        return fmt if exponent is None else replace(fmt, exponent=exponent)

    def _start(self, layer: Layer, grid: Power) -> QParams:
        """Return the grid before learning: best exponent, scales that cover all weights or have the least error."""
        exponent = best_exponent(layer.weight, grid, self._objective) if grid.exponent is None else grid.exponent
        q = grid.params(grid.absmax(layer.weight), exponent)
        return q if self.options.begin == "minmax" else mse_clip(layer.weight, grid, q)


class PowerCodes:
    """The variables of one weight: latent codes and the logarithm of the exponent.

    Args:
        w: `[out, in]` float32.
        fmt: Its format.
        q: The grid it starts from.
        options: Learning rates, and what is fixed.
        codes: uint8 `[out, in]`, those it starts from; None for the nearest. Weights begin within them, where they are
            or as close to that as possible.
    """

    def __init__(self, w: Tensor, fmt: Power, q: QParams, options: NupesOptions, codes: Tensor | None = None) -> None:
        assert q.exponent is not None, "power parameters carry their exponent"
        self.fmt, self.start = fmt, q
        self.latent = latent_codes(w, fmt, q, options.rounding)  # V [out, in]
        if codes is not None:
            middle = fmt.integers(codes).float()
            self.latent = torch.clamp(self.latent, middle - _INSIDE, middle + _INSIDE)
        self.theta = -q.exponent.log()  # [1]
        self.groups = [(self.latent, options.lr)]
        self.learns_exponent = (
            fmt.bits > 2 and options.exponent is None and options.scope == "layer" and options.lr_exponent > 0
        )
        if self.learns_exponent:
            self.groups.append((self.theta, options.lr_exponent))
        self.log_scale = torch.zeros_like(q.scale, dtype=torch.float32)  # ln m, relative to the start
        scale_rate = 0.16 / 2**fmt.bits if options.lr_scale is None else options.lr_scale
        self.learns_scale = scale_rate > 0
        if self.learns_scale:
            self.groups.append((self.log_scale, scale_rate))
        # Nothing but zeros: the scale means nothing, and zeros stay.
        self.alive = (grouped(w, fmt.group_size).abs() >= TINY).any(-1, keepdim=True)  # [out, groups, 1]
        self._last: tuple[Tensor, QParams] | None = None

    @property
    def exponent(self) -> float:
        """The exponent as it is now, in stored precision."""
        q = self.params()
        assert q.exponent is not None, "power parameters carry their exponent"
        return float(q.exponent)

    def value(self) -> Tensor:
        """Return `What`, float32 `[out, in]`, and keep what `backward` needs."""
        index, q = self._index(), self.params()
        self._last = index, q
        return self._decoded(index, q)

    def rounded(self) -> Tensor:
        """Return `What`, float32 `[out, in]`."""
        return self._decoded(self._index(), self.params())

    def backward(self, gradient: Tensor, progress: float) -> None:
        """Set the gradients of codes and exponent; see the top of this file."""
        assert self._last is not None, "value() comes first"
        index, q = self._last
        assert q.exponent is not None, "power parameters carry their exponent"
        e = 1 / float(q.exponent)
        # Where the loss is too small for a float32 its gradient is not finite; codes that are NaN index no table.
        finite = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        scaled = grouped(finite, self.fmt.group_size).mul_(self.fmt.steps(q) * self.alive)  # [out, groups, group]
        table = self._signed(q)  # [2 Q + 1]
        top = self.fmt.largest_code
        magnitude = torch.arange(-top, top + 1, device=table.device).abs()
        # In units of the scale, m / Q**e, the powers of Q drop out.
        slope = e * magnitude.clamp(min=0.5).double().pow(e - 1)
        scaled_flat = scaled.flatten(-2)
        self.latent.grad = looked_up(slope.float(), index).mul_(scaled_flat)
        if self.learns_scale:
            moved = grouped(looked_up(table, index).mul_(scaled_flat), self.fmt.group_size).sum(-1)  # [out, groups]
            self.log_scale.grad = moved.sum_to_size(self.log_scale.shape)
        if self.learns_exponent:
            # Zero has no logarithm and its value does not move: any other magnitude in its place, times zero.
            share = magnitude.masked_fill(magnitude == 0, top).double().div(top).log()
            turn = (e * table.double() * share).float()
            self.theta.grad = looked_up(turn, index).mul_(scaled_flat).sum().reshape(1)
        self._last = None

    def quantized(self) -> Quantized:
        """Return codes and grid."""
        return Quantized(self.fmt.signed_codes(self._index() - self.fmt.largest_code), self.params())

    def params(self) -> QParams:
        """Return the grid in stored precision: the exponent with three decimals, `m` as near as scales allow."""
        self.theta.clamp_(0, _LOG_STEEPEST)
        if not self.learns_exponent and not self.learns_scale:
            return self.start
        assert self.start.exponent is not None, "power parameters carry their exponent"
        exponent = round(math.exp(-float(self.theta)), 3) if self.learns_exponent else float(self.start.exponent)
        return self.fmt.moved(self.start, exponent, self.log_scale.exp())

    def _index(self) -> Tensor:
        """Return the nearest codes plus Q, int32 `[out, in]`."""
        top = self.fmt.largest_code
        return self.latent.clamp_(-top, top).round().add_(top).to(torch.int32)

    def _signed(self, q: QParams) -> Tensor:
        """Return the values at scale 1 of -Q to Q, float32."""
        assert q.codebook is not None, "power parameters carry their table"
        magnitudes = q.codebook[: self.fmt.largest_code + 1]
        return torch.cat([magnitudes[1:].flip(0).neg(), magnitudes])

    def _decoded(self, index: Tensor, q: QParams) -> Tensor:
        return grouped(looked_up(self._signed(q), index), self.fmt.group_size).mul_(self.fmt.steps(q)).flatten(-2)


def latent_codes(w: Tensor, fmt: Power, q: QParams, rounding: str) -> Tensor:
    """Return where every weight lies on the grid, in codes from -Q to Q, float32 `[out, in]`.

    Rounded, it is the code of the value whose power is nearest (`rounding="power"`: `|w / scale|**a`), or of the
    nearest value (`rounding="nearest"`: linear between neighbouring values).
    """
    assert q.exponent is not None, "power parameters carry their exponent"
    assert q.codebook is not None, "power parameters carry their table"
    z = grouped(w, fmt.group_size) / fmt.steps(q)
    size = z.abs()
    if rounding == "power":
        found = size.pow_(float(q.exponent))
    else:
        magnitudes = q.codebook[: fmt.largest_code + 1]
        below = torch.bucketize(size, magnitudes[1:], right=True, out_int32=True).clamp_(max=fmt.largest_code - 1)
        low, width = magnitudes[below], magnitudes.diff()[below]
        found = size.sub_(low).div_(width).add_(below)
    return torch.copysign(found.clamp_(max=fmt.largest_code), z).flatten(-2)


def _gptq(block: Block, generator: torch.Generator) -> Outcome:
    """Return what GPTQ makes of the layers, on grids whose exponents it searches unless they are given."""
    decisions: dict[str, Decision] = {}
    events: list[str] = []
    for fmt in dict.fromkeys(fmt for _, fmt in block.layers):
        outcome = GPTQ().solve_group([layer for layer, own in block.layers if own == fmt], fmt, generator)
        decisions.update(outcome.decisions)
        events += outcome.events
    return Outcome(decisions, tuple(events))


def _stored(decision: Decision, fmt: QuantFormat) -> Decision:
    """Return a decision on a power grid as the format stores it."""
    if not isinstance(fmt, IntFormat):
        return decision
    assert isinstance(decision, Quantized)
    codes, q = as_integers(decision.codes, decision.qparams, fmt)
    return Quantized(codes, q)
