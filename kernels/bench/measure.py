"""Measuring one cell of the table on a GPU, with every competitor on the same data in the same run."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats import get_format
from compressor.kernels.bench.results import Cell, Machine
from compressor.kernels.bench.roofline import LAYERS, Row
from compressor.kernels.gpu import ops, timing
from compressor.kernels.gpu.layout import RuntimeWeight, unpack_words
from compressor.kernels.gpu.prepare import prepare
from compressor.kernels.gpu.samples import random_weight
from compressor.kernels.gpu.tiles import path_for

REPACKS = 3
"""Times a weight is laid out, of which the fastest counts: the first also starts the device."""

CHECKED_ROWS = 512
"""Rows of the weight whose part of the result is compared with float64."""

Peer = Callable[[Tensor], Tensor]


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
    weight = random_weight(row.grid, n, k, row.kind, "cuda", group=row.group)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [weight.clone() for _ in range(timing.copies_for(weight.nbytes, cache))]
    dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(timing.copies_for(2 * n * k, cache))]
    peers = {name: make(weight) for name, make in PEERS.items() if row.grid == "int4" and row.kind == "group"}
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        seconds = timing.time_calls([_call(x, copy) for copy in copies])
        dense_seconds = timing.time_calls([_dense_call(x, w) for w in dense])
        times = {name: timing.time_calls([_peer_call(x, p) for p in peer]) for name, peer in peers.items() if peer}
        yield Cell(row.name, layer, m, weight.nbytes, seconds, dense_seconds, times, _error(x, weight), path_for(m))


def repack_seconds(row: Row, device: str, shape: tuple[int, int] = (4096, 4096)) -> float:
    """Return the seconds of laying a million weights of a format out on a device, from what lies on disk."""
    fmt = get_format(*row.stored, torch.bfloat16)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = fmt.fit(w)
    packed = fmt.pack(fmt.encode(w, q), q)
    packed = replace(packed, tensors={name: tensor.to(device) for name, tensor in packed.tensors.items()})
    seconds = []
    for _ in range(REPACKS):
        _wait(device)
        started = time.perf_counter()
        prepare(packed, fmt)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / w.numel() * 1e6


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _call(x: Tensor, weight: RuntimeWeight) -> Callable[[], object]:
    return lambda: ops.linear(x, weight, None, torch.bfloat16)


def _dense_call(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def _peer_call(x: Tensor, peer: Peer) -> Callable[[], object]:
    return lambda: peer(x)


def _error(x: Tensor, weight: RuntimeWeight) -> float:
    """Return the relative error of the first rows' part of the result against float64."""
    from compressor.kernels.gpu.launch import dequantize

    n = min(CHECKED_ROWS, weight.shape[0])
    expected = x.double() @ dequantize(weight, torch.float32, 0, n).double().T
    found = ops.linear(x, weight, None, torch.bfloat16)[:, :n].double()
    return float((found - expected).norm() / expected.norm())


def _tinygemm(weight: RuntimeWeight) -> list[Peer]:
    """Return PyTorch's own int4 kernel on the same codes and scales, on copies larger than the cache."""
    n, k = weight.shape
    if weight.group not in (32, 64, 128, 256) or n % 8 or k % 1024:
        return []
    codes = unpack_words(weight.words, weight.bits, "int4", weight.shape)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = weight.scale.transpose(0, 1).flatten(1)[:n, : k // weight.group].T.contiguous()  # [groups, n]
    both = torch.stack((scale, torch.zeros_like(scale)), -1).to(torch.bfloat16)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [packed.clone() for _ in range(timing.copies_for(packed.nbytes, cache))]
    return [_tinygemm_call(copy, weight.group, both) for copy in copies]


def _tinygemm_call(packed: Tensor, group: int, scales: Tensor) -> Peer:
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _gemlite(weight: RuntimeWeight) -> list[Peer]:
    """Return gemlite's kernel on random codes of the same shape, if it is installed."""
    try:
        gemlite = importlib.import_module("gemlite")
    except ImportError:
        return []
    n, k = weight.shape
    codes = unpack_words(weight.words, weight.bits, "int4", weight.shape)
    scale = weight.scale.transpose(0, 1).flatten(1)[:n, : k // weight.group].reshape(-1, 1).contiguous()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    layers: list[Peer] = []
    for _ in range(timing.copies_for(weight.nbytes, cache)):
        layer = gemlite.GemLiteLinear(
            4,
            group_size=weight.group,
            in_features=k,
            out_features=n,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        layer.pack(codes, scale, torch.full_like(scale, 8), None)
        layers.append(layer.forward)
    return layers


PEERS: dict[str, Callable[[RuntimeWeight], list[Peer]]] = {"tinygemm": _tinygemm, "gemlite": _gemlite}
"""Other kernels for int4 with groups, by name: their calls on copies of a weight; none where they do not apply."""
