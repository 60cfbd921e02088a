"""Lanes that several processes filled add up to what one process sums, bit for bit; here the processes are threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.calibration.channels import ChannelRange, MaxAbs, MeanAbs, SquareSum
from compressor.calibration.exchange import count_rows, join_lanes
from compressor.calibration.stats import LANES, Laned, SecondMoment, lane_of, samples_of
from compressor.ranks import Ranks

CPU = torch.device("cpu")
SPECS = [SecondMoment(), SecondMoment(block=8), MeanAbs(), SquareSum(), MaxAbs(), ChannelRange(), ChannelRange(cut=0.8)]


class Threads(Ranks):
    """Processes that are threads; every pair has a queue."""

    def __init__(self, rank: int, size: int, lines: dict[tuple[int, int], queue.Queue[Any]]) -> None:
        self.rank, self.size, self._lines = rank, size, lines

    def gather(self, value: Any) -> list[Any]:
        for other in range(self.size):
            self._lines[self.rank, other].put(value)
        return [self._lines[other, self.rank].get(timeout=20) for other in range(self.size)]

    def send(self, tensor: Tensor, to: int) -> None:
        self._lines[self.rank, to].put(tensor.clone())

    def receive(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self._lines[source, self.rank].get(timeout=20))

    def broadcast(self, tensor: Tensor, root: int) -> None:
        if self.rank == root:
            for other in range(self.size):
                if other != root:
                    self.send(tensor, other)
        else:
            self.receive(tensor, root)


def together(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    lines = {(a, b): queue.Queue[Any]() for a in range(size) for b in range(size)}
    out: list[Any] = [None] * size

    def run(rank: int) -> None:
        out[rank] = work(Threads(rank, size, lines))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return out


def samples(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(7, 16, generator=generator) * 3 for _ in range(count)]


def shared(spec: Any, rows: list[Tensor], ranks: Threads, keeper: int | None) -> Any:
    total, lanes = spec.start(16, CPU), min(LANES, len(rows))
    for first in range(0, lanes, ranks.size):
        if first + ranks.rank < lanes:
            for sample in samples_of(first + ranks.rank, len(rows)):
                total.update(rows[sample])
        join_lanes(total, ranks, min(ranks.size, lanes - first), keeper)
    count_rows([total], ranks)
    return total


@pytest.mark.parametrize("keeper", [None, 1])
@pytest.mark.parametrize(("size", "count"), [(2, 11), (3, 20), (3, 5), (9, 8)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_same_as_alone(spec: Any, size: int, count: int, keeper: int | None) -> None:
    rows = samples(count)
    alone = spec.start(16, CPU)
    for lane in range(min(LANES, count)):
        for sample in samples_of(lane, count):
            alone.update(rows[sample])
        alone.close_lane()
    totals = together(size, lambda ranks: shared(spec, rows, ranks, keeper))
    for rank, total in enumerate(totals):
        assert isinstance(total, Laned)
        assert total.n_tokens == alone.n_tokens == 7 * count
        if keeper in (None, rank):
            assert torch.equal(total.value(), alone.value())
            assert total.max_abs == alone.max_abs


def test_a_nan_that_one_process_saw_is_known_to_all() -> None:
    rows = samples(4)
    rows[2][3, 5] = torch.nan
    for spec in (SecondMoment(), MeanAbs(), MaxAbs()):
        for total in together(2, lambda ranks, spec=spec: shared(spec, rows, ranks, None)):
            assert total.max_abs != total.max_abs


def test_who_does_not_keep_a_total_holds_none() -> None:
    one, other = together(2, lambda ranks: shared(SecondMoment(), samples(8), ranks, 0))
    assert one._sum is not None
    assert other._sum is None
    assert one._open is other._open is None, "lanes that are closed give their memory back"


@pytest.mark.parametrize("count", [1, 3, 8, 9, 17, 128])
def test_lanes_hold_every_sample_once(count: int) -> None:
    lanes = [samples_of(lane, count) for lane in range(min(LANES, count))]
    assert [sample for lane in lanes for sample in lane] == list(range(count))
    assert all(lane_of(sample, count) == index for index, lane in enumerate(lanes) for sample in lane)
