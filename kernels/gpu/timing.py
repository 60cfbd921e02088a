"""Timing kernels on a GPU so that the numbers mean something.

Calls are captured in a CUDA graph, because starting a kernel from Python costs more than running it; each call of a
replay reads another copy of the weight, together larger than the cache; and the median of many replays counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_CACHES = 3
"""Weight copies together are at least this many times the L2 cache."""

MIN_CALLS, REPLAYS = 20, 50


def copies_for(nbytes: int, cache_bytes: int) -> int:
    """Return how many copies of a weight of `nbytes` make every read miss a cache of `cache_bytes`."""
    return max(2, -(-COLD_CACHES * cache_bytes // max(nbytes, 1)))


def time_calls(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Return the median seconds of one call, over replays of a graph of all `calls` in turn.

    Args:
        calls: The same work on different copies of its data; repeated until there are at least `MIN_CALLS`.
        replays: Replays to take the median of.
    """
    rounds = -(-MIN_CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e-3)
    return statistics.median(times) / (rounds * len(calls))


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Return the bytes read and written per second by copying `nbytes` inside the device's memory."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / time_calls([lambda: target.copy_(source)], 10)


def matmul_rate(size: int = 8192) -> float:
    """Return the operations per second of a square bfloat16 matrix product on random numbers."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / time_calls([lambda: torch.mm(a, b, out=out)], 10)
