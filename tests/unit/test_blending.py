"""Moved tokens: where they go, that both streams move alike, and what they should become."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.formats import get_format
from compressor.methods.adaround import AdaRoundOptions
from compressor.methods.base import Block
from compressor.methods.blending import blended
from compressor.methods.flexround import FlexRound, FlexRoundOptions
from compressor.testing.blocks import SAMPLES, block_of
from compressor.testing.layers import correlated_inputs, heavy_tailed_weights

WIDTH = 32


def block(bits: int = 2, tokens: int = 40 * SAMPLES) -> tuple[Block, Tensor]:
    weight = heavy_tailed_weights(24, WIDTH, 5)
    fmt = get_format(f"int{bits}", 16, torch.float32)
    return block_of(fmt, [weight], correlated_inputs(WIDTH, tokens, 7), shift=0.1), weight


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tokens", [40 * SAMPLES, 39 * SAMPLES + 1])  # the latter: a last sample that is shorter
def test_both_streams_move_alike_and_the_original_block_says_what_becomes_of_it(tokens: int) -> None:
    made, weight = block(tokens=tokens)
    for sample in (0, SAMPLES - 1):
        before = made.inputs(sample)
        hidden, target = blended(made, sample, before, 0.5, generator())
        shift = hidden - before
        moved = shift.abs().amax(-1) > 0
        assert 0.2 < moved.double().mean() < 0.8
        torch.testing.assert_close(target, F.linear(made.fp_inputs(sample) + shift, weight), rtol=1e-5, atol=1e-5)
        assert torch.equal(before, made.inputs(sample)), "what is kept is not written to"


def test_tokens_move_towards_tokens_and_no_further_than_they_may() -> None:
    made, _ = block()
    all_tokens = torch.cat([made.fp_inputs(sample)[0] for sample in range(SAMPLES)])
    original = made.fp_inputs(2)[0]
    reach = 0.3
    hidden, _ = blended(made, 2, made.fp_inputs(2), reach, generator(9))
    found = 0
    for place, (old, new) in enumerate(zip(original[1:], hidden[0, 1:], strict=True), 1):
        step = new - old
        if not step.any():
            continue
        ways = all_tokens - old
        share = (ways @ step) / ways.square().sum(-1).clamp(min=1e-9)
        off = (share[:, None] * ways - step).norm(dim=-1)
        best = int(off.argmin())
        assert off[best] < 1e-4, f"token {place} moved towards none"
        assert 0 < share[best] <= reach + 1e-5
        found += 1
    assert found > 5


def test_the_first_token_moves_towards_first_ones_as_far_as_it_likes() -> None:
    made, _ = block()
    firsts = torch.stack([made.fp_inputs(sample)[0, 0] for sample in range(SAMPLES)])
    shares = []
    for seed in range(40):
        hidden, _ = blended(made, 1, made.fp_inputs(1), 0.1, generator(seed))
        step = hidden[0, 0] - firsts[1]
        if step.norm() < 1e-6:  # its own sample was drawn
            continue
        ways = firsts - firsts[1]
        share = (ways @ step) / ways.square().sum(-1).clamp(min=1e-9)
        assert (share[:, None] * ways - step).norm(dim=-1).min() < 1e-4
        shares.append(float(share[(share[:, None] * ways - step).norm(dim=-1).argmin()]))
    assert max(shares) > 0.5


def test_it_is_on_at_two_bits_and_off_above_unless_said_otherwise() -> None:
    assert [FlexRoundOptions().reach(bits) for bits in (2, 3, 4, 8)] == [0.5, 0, 0, 0]
    assert FlexRoundOptions(blend=0.2).reach(4) == 0.2
    assert AdaRoundOptions(blend=0).reach(2) == 0


def test_learning_with_it_is_repeatable_and_differs_from_learning_without() -> None:
    results = []
    for blend in (0.5, 0.5, 0):
        made, _ = block()
        outcome = FlexRound(FlexRoundOptions(iters=20, blend=blend, start="mse")).solve_block(made, generator())
        (decision,) = outcome.decisions.values()
        results.append(decision.codes)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
