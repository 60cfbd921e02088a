"""Block-by-block reconstruction: learn how a block's weights round so that the block's output stays what it was.

The loop shared by FlexRound and AdaRound. Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by
Block Reconstruction", arXiv 2102.05426; streams and loss as in FlexRound (Lee et al. 2023, arXiv 2306.00317): the
block reads what the compressed prefix produces, and its target is the original output on original input. Where inputs
of layers are rounded as well, they are while learning, as they will be in the result; a share of their values may be
left out at random (Wei et al. 2022, "QDrop", ICLR, arXiv 2203.05740).

A rounding says what its variables mean and how a gradient reaches them; the loop knows nothing about grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.decision import Outcome, Quantized
from compressor.errors import NumericalError
from compressor.formats.base import QParams, QuantFormat
from compressor.methods.base import Block, Layer
from compressor.methods.blending import blended
from compressor.methods.learning import LearningOptions

PROBES = 4
"""Calibration samples whose loss decides which variables are kept."""

_TEXT = 3
"""Dimensions of hidden states of a text, `[1, tokens, hidden]`; those of images are `[n, channels, height, width]`."""

PATIENCE = 10
"""Steps in a row without a finite loss after which learning gives up."""


class Rounding(Protocol):
    """Learnable rounding of one weight."""

    groups: list[tuple[Tensor, float]]
    """Variables, updated in place by the optimizer, and the learning rate of each."""

    @property
    def exponent(self) -> float | None:
        """The grid's exponent as it is now, which inputs on grids of powers take over; None for other grids."""
        ...

    def value(self) -> Tensor:
        """Return the weight the block computes with while learning, float32 `[out, in]`; a tensor of its own."""
        ...

    def rounded(self) -> Tensor:
        """Return the weight as it would be stored now, float32 `[out, in]`; may be the same as `value()`."""
        ...

    def backward(self, gradient: Tensor, progress: float) -> None:
        """Set the variables' `.grad` from the gradient of the loss in the last `value()`.

        Args:
            gradient: float32 `[out, in]`.
            progress: Share of the steps that are done, from 0 to 1.
        """
        ...

    def quantized(self) -> Quantized:
        """Return the decision; decoded, it is `rounded()` bit for bit."""
        ...


@dataclass(frozen=True)
class Learned:
    """What learning did to a block.

    Attributes:
        start: Weighted squared error before, relative to the weighted square of the target; mean of the probe samples.
        end: The same with the variables that were kept.
        skipped: Steps whose loss was not finite.
        unreached: Weights that no sample used: experts no token was sent to.
    """

    start: float
    end: float
    skipped: int
    unreached: tuple[str, ...]


def learn(
    block: Block,
    start: Callable[[Layer, QuantFormat], Rounding],
    options: LearningOptions,
    generator: torch.Generator,
) -> Outcome:
    """Learn the roundings of a block and return them as decisions, with the losses and what went wrong.

    Where learning ends above rounding to nearest on the min-max grid, that is what is returned, and an event says so.

    Args:
        block: The block.
        start: Makes the rounding of one layer, not yet learned.
        options: The loop's options.
        generator: Everything random.

    Raises:
        NumericalError: See `reconstruct`.
    """
    bits = max(fmt.bits for _, fmt in block.layers)
    nearest = {layer.ref.name: _nearest(layer, fmt) for layer, fmt in block.layers}
    decoded = {layer.ref.name: fmt.decode(*nearest[layer.ref.name]) for layer, fmt in block.layers}
    products = options.products(block.device, bits)
    powers = {name: float(q.exponent) for name, (_, q) in nearest.items() if q.exponent is not None}
    probes = _spread(block.n_samples, PROBES * block.pieces)
    before = _probe_loss(block, decoded, powers, probes, products, options.balance)
    del decoded
    roundings = {layer.ref.name: start(layer, fmt) for layer, fmt in block.layers}
    learned = reconstruct(block, roundings, options, bits, generator)
    decisions = {name: rounding.quantized() for name, rounding in roundings.items()}
    events = [f"{name}: no calibration token reached it, so it is rounded as it was" for name in learned.unreached]
    if learned.skipped:
        events.append(f"{block.name}: {learned.skipped} steps skipped, their loss was not finite")
    if learned.end >= learned.start > 0 and options.steps(bits):
        events.append(f"{block.name}: learning did not lower the loss; the grid it started from is kept")
    if learned.end > before:
        events.append(f"{block.name}: rounding to nearest has the least loss, so that is what is kept")
        decisions = {name: Quantized(*values) for name, values in nearest.items()}
    return Outcome(decisions, tuple(events), {"loss_before": before, "loss_after": min(learned.end, before)})


def _nearest(layer: Layer, fmt: QuantFormat) -> tuple[Tensor, QParams]:
    """Return the codes of rounding to nearest on the min-max grid, and the grid."""
    q = layer.fit(fmt)
    return fmt.encode(layer.weight, q), q


def reconstruct(
    block: Block,
    roundings: Mapping[str, Rounding],
    options: LearningOptions,
    bits: int,
    generator: torch.Generator,
) -> Learned:
    """Learn all roundings of a block together; they hold the best variables seen afterwards.

    Adam on all variables, with rates that fall to zero along a cosine. The loss is the squared error of the block's
    output. Every few steps it is measured on fixed samples, and the variables with the least are kept: the result is
    never worse on these samples than the start.

    Args:
        block: The block.
        roundings: Tensor name -> its rounding, for every layer of the block.
        options: The loop's options.
        bits: Bits of the widest weight: beyond 4, products stay in float32.
        generator: Orders the samples.

    Raises:
        NumericalError: The loss is not finite at the start, or `PATIENCE` times in a row.
    """
    products = options.products(block.device, bits)
    probes = _spread(block.n_samples, PROBES * block.pieces)
    start = best = _probe_loss(block, _rounded(roundings), _exponents(roundings), probes, products, options.balance)
    if not math.isfinite(start):
        raise NumericalError(f"{block.name}: its rounded output is not finite before learning", "try another format")
    variables = [(variable, rate) for rounding in roundings.values() for variable, rate in rounding.groups]
    kept = [variable.clone() for variable, _ in variables]
    # One group per rate: the fused step then serves many variables at once.
    rates = sorted({rate for _, rate in variables})
    groups = [{"params": [v for v, own in variables if own == rate], "lr": rate} for rate in rates]
    steps = options.steps(bits)
    optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True) if steps and groups else None
    order = _orders(block.n_samples, generator)
    skipped = in_a_row = 0
    unreached = dict.fromkeys(roundings) if steps else {}
    checks = {round(steps * (index + 1) / options.checks) for index in range(options.checks)}
    for step in range(steps if optimizer else 0):
        assert optimizer is not None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        samples = [next(order) for _ in range(options.batch * block.pieces)]
        loss = _step(block, roundings, samples, options, bits, products, generator, step / steps, unreached, start)
        if math.isfinite(loss):
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == PATIENCE:
                raise NumericalError(
                    f"{block.name}: the loss was not finite {PATIENCE} steps in a row, from step {step - PATIENCE + 2}",
                    "lower the learning rate with --option lr=..., or use --option precision=fp32",
                )
        if step + 1 in checks:
            now = _probe_loss(block, _rounded(roundings), _exponents(roundings), probes, products, options.balance)
            block.progress(f"{block.name}: step {step + 1} of {steps}, loss {now:.3g} of {start:.3g}")
            if now < best:
                best = now
                for copy, (variable, _) in zip(kept, variables, strict=True):
                    copy.copy_(variable)
    for copy, (variable, _) in zip(kept, variables, strict=True):
        variable.copy_(copy)
        variable.grad = None
    return Learned(start, best, skipped, tuple(unreached))


def _step(
    block: Block,
    roundings: Mapping[str, Rounding],
    samples: list[int],
    options: LearningOptions,
    bits: int,
    products: AbstractContextManager[None],
    generator: torch.Generator,
    progress: float,
    unreached: dict[str, None],
    start: float,
) -> float:
    """Set every variable's gradient from a few samples and return their loss; takes what they reach off `unreached`.

    The loss is the squared error in units of the one at the start, so that rates and weights of further terms mean the
    same in every block.
    """
    weights = {name: rounding.value().requires_grad_() for name, rounding in roundings.items()}
    exponents = _exponents(roundings)
    total = 0.0
    with torch.enable_grad(), products:  # around all samples: autocast then converts every weight once
        for sample in samples:
            hidden, target = block.inputs(sample), block.targets(sample)
            if options.input_mix < 1:
                keep = torch.rand(hidden.shape, generator=generator).to(hidden.device) < options.input_mix
                hidden = torch.where(keep, hidden, block.fp_inputs(sample))
            if (reach := options.reach(bits)) and hidden.ndim == _TEXT:
                hidden, target = blended(block, sample, hidden, reach, generator)
            weight = _token_weights(target, options.balance)
            size = float(target.square().mul_(weight).sum())
            unit = max(start * size * len(samples), torch.finfo(torch.float32).tiny)
            with block.rounding(options.drop, generator, exponents):
                leaving = block.forward(hidden, weights).float()
            loss = (leaving - target).square().mul(weight).sum() / unit
            if not torch.isfinite(loss):
                return math.nan
            loss.backward()
            total += float(loss.detach())
    for name, rounding in roundings.items():
        gradient = weights[name].grad
        if gradient is None:  # an expert that got no token at all
            gradient = torch.zeros_like(weights[name])
        if name in unreached and gradient.any():
            del unreached[name]
        rounding.backward(gradient, progress)
    return total


def _rounded(roundings: Mapping[str, Rounding]) -> dict[str, Tensor]:
    return {name: rounding.rounded() for name, rounding in roundings.items()}


def _exponents(roundings: Mapping[str, Rounding]) -> dict[str, float]:
    found = {name: rounding.exponent for name, rounding in roundings.items()}
    return {name: exponent for name, exponent in found.items() if exponent is not None}


@torch.no_grad()
def _probe_loss(
    block: Block,
    weights: Mapping[str, Tensor],
    exponents: Mapping[str, float],
    probes: list[int],
    products: AbstractContextManager[None],
    balance: float,
) -> float:
    """Return the mean over the probe samples of the weighted squared error, relative to the weighted square."""
    total = 0.0
    for sample in probes:
        target = block.targets(sample)
        weight = _token_weights(target, balance)
        with products, block.rounding(0, torch.Generator(), exponents):
            leaving = block.forward(block.inputs(sample), weights)
        error = float((leaving.float() - target).square_().mul_(weight).sum(dtype=torch.float64))
        size = float(target.square().mul_(weight).sum(dtype=torch.float64))
        total += error / size if size else error
    return total / len(probes)


def _token_weights(target: Tensor, balance: float) -> Tensor:
    """Return how much every token's squared error counts, float32 `[..., 1]`: as `size**(-2 * balance)`, at most 1.

    Of images, `[n, channels, height, width]`, it is every position's: `[n, 1, height, width]`.

    A few tokens of a language model, the first one above all, are a thousand times larger than the others. With plain
    squared errors they are all that is learned, as far as rounding can be; with relative ones they are one token among
    hundreds, although all others attend to them.
    """
    power = target.square().mean(-1 if target.ndim == _TEXT else 1, keepdim=True)
    least = power.min().clamp_(min=1e-6 * float(power.mean()))
    return (least / power.clamp_(min=least)).nan_to_num_(nan=1.0).pow_(balance)  # 0 / 0 where all is zero


def _spread(n_samples: int, count: int) -> list[int]:
    """Return `count` samples evenly spread over all, fewer if there are fewer."""
    count = min(count, n_samples)
    return [index * n_samples // count for index in range(count)]


def _orders(n_samples: int, generator: torch.Generator) -> Iterator[int]:
    """Yield samples in random order, all of them before any comes again."""
    while True:
        yield from torch.randperm(n_samples, generator=generator).tolist()
