"""Measuring one cell of the table on a GPU, with every competitor on the same data in the same run."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats import get_format
from compressor.kernels.bench.results import Cell, Machine
from compressor.kernels.bench.roofline import LAYERS, Row
from compressor.kernels.bench.subjects import Peer, subject
from compressor.kernels.gpu import int_weight, sparse, timing
from compressor.kernels.gpu.layout import SPARSE
from compressor.kernels.gpu.prepare import prepare
from compressor.kernels.gpu.samples import random_weight

REPACKS = 3
"""Times a weight is laid out, of which the fastest counts: the first also starts the device."""


def machine() -> Machine:
    """Return the device with its bandwidth and matrix rate, measured now."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": str(torch.__version__)}
    for package in ("triton", "gemlite"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        properties.name,
        f"{properties.major}.{properties.minor}",
        timing.copy_bandwidth(),
        timing.matmul_rate(),
        versions,
    )


def measure_layer(row: Row, layer: str, rows: tuple[int, ...]) -> Iterator[Cell]:
    """Yield the cells of one format on one layer."""
    n, k = LAYERS[layer]
    measured = subject(row, n, k, torch.cuda.get_device_properties(0).L2_cache_size)
    peers = {name: calls for name, calls in measured.peers().items() if calls}
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        seconds = timing.time_calls(measured.calls(x))
        dense_seconds = timing.time_calls(measured.dense_calls(x))
        times = {name: timing.time_calls([_peer_call(x, peer) for peer in calls]) for name, calls in peers.items()}
        weight_bytes = row.touched_bytes(n, k, m)
        yield Cell(row.name, layer, m, weight_bytes, seconds, dense_seconds, times, measured.error(x), measured.path(m))


def repack_seconds(row: Row, device: str, shape: tuple[int, int] = (4096, 4096)) -> float:
    """Return the seconds of laying a million weights of a format out on a device, from what lies on disk."""
    lay_out = _laying_out(row, device, shape)
    seconds = []
    for _ in range(REPACKS):
        _wait(device)
        started = time.perf_counter()
        lay_out()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / math.prod(shape) * 1e6


def _laying_out(row: Row, device: str, shape: tuple[int, int]) -> Callable[[], object]:
    if row.grid in SPARSE:  # stored dense
        dense = sparse.unpack(random_weight(row.grid, *shape, row.kind)).to(device)
        return lambda: sparse.pack(dense)
    fmt = get_format(*row.stored, torch.bfloat16)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    packed = replace(packed, tensors={name: tensor.to(device) for name, tensor in packed.tensors.items()})
    lay_out = int_weight.prepare if row.inputs else prepare
    return lambda: lay_out(packed, fmt)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _peer_call(x: Tensor, peer: Peer) -> Callable[[], object]:
    return lambda: peer(x)
