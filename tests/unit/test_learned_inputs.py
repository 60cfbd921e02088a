"""Rounding inputs while learning: which passes round them, what gradients do, and that it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.engine.rounding import _straight_through
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.ints import IntFormat
from compressor.inputs import Quantize
from compressor.methods.adaround import AdaRound, AdaRoundOptions
from compressor.methods.base import Block
from compressor.methods.flexround import FlexRound, FlexRoundOptions
from compressor.testing.blocks import residual_mlp
from compressor.testing.layers import quantized

BITS4 = Quantize(INPUT_FORMATS["int4-token"])


@pytest.mark.parametrize("left", [0.0, 0.3, 1.0])
def test_values_are_rounded_and_gradients_pass(left: float) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    treat = _straight_through((BITS4,), left, torch.Generator().manual_seed(1))
    out = treat(x)
    rounded = BITS4.apply(x.detach())
    kept = out == x
    assert torch.equal(torch.where(kept, x, rounded), out), "every value is rounded as at run time, or left"
    assert abs(float(kept.float().mean()) - left) < 0.15
    (gradient,) = torch.autograd.grad((out * torch.arange(32)).sum(), x)
    assert torch.equal(gradient, torch.arange(32.0).expand(4, 32))
    assert left in (0, 1) or not torch.equal(treat(x) == x, kept), "drawn anew"


def _same(x: Tensor) -> Tensor:
    return x


def rounding_mlp(fmt: IntFormat) -> tuple[Block, list[tuple[bool, bool, float]]]:
    """Return `residual_mlp` whose forward can round its inputs to 4 bits, and what is noted of every pass.

    Noted are whether inputs were rounded, whether the weights are the original ones, and the share left.
    """
    block, width = residual_mlp(fmt), 48
    original = {layer.ref.name: layer.weight for layer, _ in block.layers}
    notes: list[tuple[bool, bool, float]] = []
    treats: list[Callable[[Tensor], Tensor]] = [_same]
    shares = [0.0]

    def forward(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        first, second = params.values()
        same = all(params[name] is weight for name, weight in original.items())
        notes.append((len(treats) > 1, same, shares[-1]))
        treat = treats[-1]
        return x + F.linear(treat(F.gelu(F.linear(treat(F.layer_norm(x, (width,))), first))), second)

    @contextmanager
    def rounding(left: float, generator: torch.Generator, exponents: Mapping[str, float]) -> Iterator[None]:
        treats.append(_straight_through((BITS4,), left, generator))
        shares.append(left)
        try:
            yield
        finally:
            treats.pop()
            shares.pop()

    return replace(block, forward=forward, rounding=rounding), notes


def test_targets_of_moved_tokens_are_those_of_the_original_block() -> None:
    block, notes = rounding_mlp(IntFormat(2, 16, torch.float32))
    FlexRound(FlexRoundOptions(iters=3, blend=0.5, drop=0.25)).solve_block(block, torch.Generator().manual_seed(0))
    assert {rounded for rounded, original, _ in notes if original} == {False}
    learned = [(rounded, left) for rounded, original, left in notes if not original]
    assert all(rounded for rounded, _ in learned)
    assert {left for _, left in learned} == {0.0, 0.25}, "what decides is rounded in full"
    assert sum(left == 0.25 for _, left in learned) == 3 * 2


@pytest.mark.parametrize(
    "method",
    [
        FlexRound(FlexRoundOptions(iters=150, balance=0, precision="fp32")),
        AdaRound(AdaRoundOptions(iters=150, balance=0, precision="fp32")),
    ],
    ids=["flexround", "adaround"],
)
def test_weights_learned_with_rounded_inputs_serve_them_better(method: FlexRound | AdaRound) -> None:
    """W4A4: the output with rounded inputs is nearer to the original than that of weights learned by themselves."""
    fmt = IntFormat(4, 16, torch.float32)
    with_inputs, _ = rounding_mlp(fmt)
    alone = residual_mlp(fmt)
    errors = {}
    for name, block in (("with", with_inputs), ("alone", alone)):
        outcome = method.solve_block(block, torch.Generator().manual_seed(0))
        decisions = {key: quantized(decision) for key, decision in outcome.decisions.items()}
        weights = {key: fmt.decode(found.codes, found.qparams) for key, found in decisions.items()}
        with torch.no_grad(), with_inputs.rounding(0, torch.Generator(), {}):
            out = [with_inputs.forward(with_inputs.inputs(i), weights) for i in range(block.n_samples)]
        errors[name] = sum(float((value - block.targets(i)).square().sum()) for i, value in enumerate(out))
    assert errors["with"] < 0.97 * errors["alone"], errors


def test_the_same_seed_drops_the_same_values() -> None:
    codes = []
    for _ in range(2):
        block, _ = rounding_mlp(IntFormat(4, 16, torch.float32))
        solve = partial(FlexRound(FlexRoundOptions(iters=4, drop=0.5)).solve_block, block)
        outcome = solve(torch.Generator().manual_seed(5))
        codes.append([quantized(decision).codes for decision in outcome.decisions.values()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
