"""Lanes that several processes filled at the same time join one total, in the order of lanes.

What a process computed alone and what many did is the same sum in the same order, bit for bit. A total is kept by one
process, which is then the one to solve with it, or by all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.calibration.stats import Laned, Part
from compressor.ranks import Ranks

CHUNK = 1 << 22
"""Numbers that are exchanged at once, which are in memory beside totals and lanes."""


def join_lanes(total: Laned, ranks: Ranks, holders: int, keeper: int | None) -> None:
    """Add the lanes that the first `holders` processes have open to the total, and open new ones.

    Args:
        total: An accumulator; every process passes its own of the same statistic.
        ranks: The processes.
        holders: How many lanes are open: that of process 0 comes first, then that of process 1, and so on.
        keeper: The process that keeps the total; None for all.
    """
    for part in total.parts(keep=keeper in (None, ranks.rank)):
        lane = part.lane.reshape(-1)
        assert lane.data_ptr() == part.lane.data_ptr(), "a lane is contiguous"
        for start in range(0, lane.numel(), CHUNK):
            place = slice(start, start + CHUNK)
            if keeper is None:
                _to_all(part, lane[place], place, ranks, holders)
            else:
                _to_one(part, lane[place], place, ranks, holders, keeper)
    total.empty_lane()


def count_rows(totals: list[Laned], ranks: Ranks) -> None:
    """Let every process know how many rows all of them have seen."""
    everyones = ranks.gather([total.tally() for total in totals])
    for index, total in enumerate(totals):
        total.count([tallies[index] for tallies in everyones])


def _to_all(part: Part, lane: Tensor, place: slice, ranks: Ranks, holders: int) -> None:
    lane = lane.clone()  # where lane and total are one, the total changes before this process's turn
    for holder in range(holders):
        values = lane.cpu() if holder == ranks.rank else torch.empty(lane.shape, dtype=lane.dtype)
        ranks.broadcast(values, holder)
        _join(part, place, values)


def _to_one(part: Part, lane: Tensor, place: slice, ranks: Ranks, holders: int, keeper: int) -> None:
    for holder in range(holders):
        if holder == keeper == ranks.rank:
            _join(part, place, lane)
        elif holder == ranks.rank:
            ranks.send(lane, keeper)
        elif keeper == ranks.rank:
            values = torch.empty(lane.shape, dtype=lane.dtype)
            ranks.receive(values, holder)
            _join(part, place, values)


def _join(part: Part, place: slice, values: Tensor) -> None:
    assert part.total is not None
    total = part.total.reshape(-1)[place]  # a view: totals are contiguous
    part.join(total, values.to(total.device))
