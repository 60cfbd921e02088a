"""Streamed second moments: the sums themselves, and that only the samples decide them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compressor.calibration.stats import LANES, SecondMoment, SecondMomentSum, lane_of

CPU = torch.device("cpu")


def samples(count: int, width: int = 24, tokens: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(tokens, width, generator=generator) * 3 + 1 for _ in range(count)]


def streamed(spec: SecondMoment, data: list[Tensor]) -> SecondMomentSum:
    """Sum samples the way the engine does: in order, closing a lane behind its last sample."""
    total = spec.start(data[0].shape[1], CPU)
    for sample, x in enumerate(data):
        total.update(x)
        if sample + 1 == len(data) or lane_of(sample, len(data)) != lane_of(sample + 1, len(data)):
            total.close_lane()
    return total


@pytest.mark.parametrize("count", [1, 3, 8, 29])
def test_second_moment_against_float64(count: int) -> None:
    data = samples(count)
    total = streamed(SecondMoment(), data)
    x = torch.cat(data).double()
    torch.testing.assert_close(total.value().double(), x.T @ x, rtol=1e-5, atol=1e-3)
    assert total.value().dtype == torch.float32
    assert total.n_tokens == 7 * count
    assert total.max_abs == float(x.abs().max())


@pytest.mark.parametrize("block", [1, 4, 24])
def test_blocks_are_the_diagonal_of_the_whole(block: int) -> None:
    data = samples(10)
    blocks = streamed(SecondMoment(block), data).value()
    whole = streamed(SecondMoment(), data).value()
    assert blocks.shape == (24 // block, block, block)
    for index, part in enumerate(blocks):
        columns = slice(index * block, (index + 1) * block)
        torch.testing.assert_close(part, whole[columns, columns], rtol=1e-5, atol=1e-4)


def test_sums_do_not_depend_on_who_summed_which_lane() -> None:
    """Any dealing of lanes to processes, each summing its own, gives the same bits when added in lane order."""
    data = samples(29)
    expected = streamed(SecondMoment(), data).value()
    lanes: dict[int, list[int]] = {}
    for sample in range(len(data)):
        lanes.setdefault(lane_of(sample, len(data)), []).append(sample)
    assert len(lanes) == LANES
    for finished in (list(range(LANES)), list(reversed(range(LANES))), [3, 7, 0, 1, 6, 2, 5, 4]):
        partial = {}
        for lane in finished:  # whichever process gets there first
            own = SecondMoment().start(24, CPU)
            for sample in lanes[lane]:
                own.update(data[sample])
            own.close_lane()
            partial[lane] = own.value()
        total = torch.zeros(24, 24)
        for lane in range(LANES):
            total += partial[lane]
        assert torch.equal(total, expected)


def test_one_long_sum_has_other_bits() -> None:
    """What lanes are for: without them the order of additions shows, so equality above is no accident."""
    data = samples(29)
    unlaned = SecondMoment().start(24, CPU)
    for x in data:
        unlaned.update(x)
    unlaned.close_lane()
    assert not torch.equal(unlaned.value(), streamed(SecondMoment(), data).value())


@pytest.mark.parametrize("n_samples", [1, 2, 7, 8, 9, 29, 64, 512])
def test_lanes_are_contiguous_and_balanced(n_samples: int) -> None:
    lanes = [lane_of(sample, n_samples) for sample in range(n_samples)]
    assert lanes == sorted(lanes)
    sizes = [lanes.count(lane) for lane in range(min(LANES, n_samples))]
    assert sum(sizes) == n_samples
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_an_open_lane_does_not_count_yet_and_empty_rows_never_do() -> None:
    total = SecondMoment().start(4, CPU)
    total.update(torch.zeros(0, 4))
    assert (total.n_tokens, total.max_abs) == (0, 0.0)
    total.update(torch.ones(2, 4))
    assert not total.value().any()
    total.close_lane()
    assert (total.value() == 2).all()
    total.close_lane()
    assert (total.value() == 2).all()


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    x = samples(1, tokens=300)[0].bfloat16()
    total = streamed(SecondMoment(), [x])
    assert torch.equal(total.value(), streamed(SecondMoment(), [x.float()]).value())


def test_a_nan_stays_visible_in_the_largest_magnitude() -> None:
    bad = torch.ones(2, 4)
    bad[1, 2] = float("nan")
    for order in ([torch.ones(2, 4), bad], [bad, torch.ones(2, 4)]):
        total = streamed(SecondMoment(), order)
        assert math.isnan(total.max_abs)
        assert total.value().isnan().any()


def test_inputs_are_not_changed() -> None:
    x = samples(1)[0]
    before = x.clone()
    streamed(SecondMoment(), [x])
    streamed(SecondMoment(4), [x])
    assert torch.equal(x, before)
