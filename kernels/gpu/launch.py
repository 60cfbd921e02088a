"""Starting the kernels: arguments, tiles and the memory that programs share.

Nothing here waits for the device, and nothing is allocated but results and partial sums, so calls can be captured in
CUDA graphs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.kernels.gpu.layout import CODES, RuntimeWeight, constants, groups_per_chunk
from compressor.kernels.gpu.tiles import Config, architecture, configure

DENSE_BYTES = 256 << 20
"""Most bytes of a weight that lie decoded in memory at once."""

UNPACK_ROWS, UNPACK_COLUMNS = 32, 128
"""Sizes of one program of `unpack_weight`."""

_COUNTERS = 4096
_ARENA = 1 << 20
ROW_CODES = {"none": 0, "times": 1, "over": 2}


def matmul(
    x: Tensor,
    weight: RuntimeWeight,
    bias: Tensor | None,
    config: Config | None = None,
    out: Tensor | None = None,
    path: str = "",
) -> Tensor:
    """Return `x @ weight.T + bias` from the packed kernel, `[m, n]` in the dtype of `x`.

    Args:
        x: `[m, k]`, float16 or bfloat16; rows may be strided.
        weight: On the device of `x`.
        bias: `[n]` or None.
        config: How to launch it; by the tile table if None.
        out: Where the result goes, `[m, n]` of any floating dtype with contiguous rows; a new tensor if None.
        path: See `tiles.configure`.
    """
    m, n = x.shape[0], weight.shape[0]
    out = x.new_empty(m, n) if out is None else out
    if m == 0:
        return out
    if config is None:
        config = configuration(weight, m, x.dtype, x.device, path)
    _start(x, weight, bias, config, out, ceil_div(m, config.tile.block_m), None)
    return out


@dataclass(frozen=True)
class Routing:
    """Which rows of a result are made by which expert; see `experts.route`.

    Attributes:
        blocks: int32 `[blocks, 3]`: expert, first place and the place behind the expert's last, see `packed_matmul`.
        order: int32: rows of the result, sorted by expert.
        block_m: Rows of a block.
    """

    blocks: Tensor
    order: Tensor
    block_m: int


def grouped_matmul(x: Tensor, experts: RuntimeWeight, routing: Routing, config: Config, out: Tensor) -> Tensor:
    """Write `x[r // per_token] @ weight[expert of r].T` to the rows r of `out` that have an expert, in one launch.

    Args:
        x: `[tokens, k]`, float16 or bfloat16; rows may be strided.
        experts: A stack: its tensors have one dimension more.
        routing: Made for `config.tile.block_m`.
        config: How to launch it.
        out: `[tokens * per_token, n]` with contiguous rows; rows without an expert stay as they are.
    """
    assert routing.block_m == config.tile.block_m, (routing.block_m, config.tile)
    if routing.blocks.shape[0]:
        _start(x, experts, None, config, out, routing.blocks.shape[0], routing)
    return out


def _start(
    x: Tensor,
    weight: RuntimeWeight,
    bias: Tensor | None,
    config: Config,
    out: Tensor,
    m_tiles: int,
    routing: Routing | None,
) -> None:
    from compressor.kernels.gpu.matmul import packed_matmul

    (m, n), k, tile = out.shape, x.shape[1], config.tile
    n_tiles = ceil_div(n, tile.block_n)
    tiles = n_tiles * m_tiles
    steps = ceil_div(ceil_div(k, tile.block_k), config.split)
    partial, counters = out, out
    if config.split > 1:
        partial = torch.empty(config.split * tiles * tile.block_n * tile.block_m, dtype=torch.float32, device=x.device)
        counters = COUNTERS.get(tiles, x.device)
    blocks, order, per_token, experts = out, out, 1, (0, 0, 0, 0)
    if routing is not None:
        blocks, order, per_token, experts = routing.blocks, routing.order, m // x.shape[0], _expert_strides(weight)
    or0, or1, or2 = constants(weight.grid, x.dtype)
    packed_matmul[(tiles, config.split)](
        x, *_pointers(weight), out if bias is None else bias, out, partial, counters, blocks, order,
        m, n, k, n_tiles, steps, x.stride(0), x.stride(1), weight.words.stride(-2), _bits_stride(weight),
        _scale_stride(weight), out.stride(0), *experts, per_token, or0, or1, or2, 1.0,
        **specialisation(weight, config, bias is not None), GROUPED=routing is not None, num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def dense_matmul(x: Tensor, weight: RuntimeWeight, bias: Tensor | None, weight_dtype: torch.dtype) -> Tensor:
    """Return `x @ weight.T + bias`, the weight written out in pieces, rounded to `weight_dtype`, and multiplied."""
    n, k = weight.shape
    rows = max(64, DENSE_BYTES // (k * weight_dtype.itemsize) // 64 * 64)
    if rows >= n:
        dense = dequantize(weight, weight_dtype).to(x.dtype)
        return torch.nn.functional.linear(x, dense, bias)
    out = x.new_empty(x.shape[0], n)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        dense = dequantize(weight, weight_dtype, start, stop).to(x.dtype)
        torch.mm(x, dense.T, out=out[:, start:stop])
    return out if bias is None else out.add_(bias)


def dequantize(weight: RuntimeWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows `start` to `stop` of the weight, decoded in float32 and rounded to `dtype` once.

    `start` must be a multiple of `layout.PAD_ROWS`.
    """
    from compressor.kernels.gpu.dequant import unpack_weight

    n, k = weight.shape
    stop = n if stop is None else stop
    out = torch.empty(stop - start, k, dtype=dtype, device=weight.words.device)
    words, bits, scale, zero, row, table = _pointers(weight)
    block_n, block_k = UNPACK_ROWS, UNPACK_COLUMNS
    while weight.group and block_k % weight.group and weight.group % block_k:
        block_k //= 2
    or0, or1, or2 = constants(weight.grid, torch.float16)
    unpack_weight[(ceil_div(stop - start, block_n), ceil_div(k, block_k))](
        words[start:], bits[start:] if weight.bits.numel() else bits, scale[:, start:] if scale.numel() else scale,
        zero[:, start:] if zero.numel() else zero, row[start:] if row.numel() else row, table, out, stop - start, k,
        words.stride(0), _bits_stride(weight), _scale_stride(weight), out.stride(0), or0, or1, or2,
        GRID=weight.grid, GROUP=weight.group, PER=groups_per_chunk(weight.group), SCALE=weight.scale_kind,
        ROW=ROW_CODES[weight.row_kind], HAS_ZERO=weight.zero.numel() > 0, CODES=CODES[weight.grid], BLOCK_N=block_n,
        BLOCK_K=block_k, INTERPRET=interpreted(), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def specialisation(weight: RuntimeWeight, config: Config, has_bias: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `packed_matmul` for a weight."""
    return {
        "GRID": weight.grid,
        "GROUP": weight.group,
        "PER": groups_per_chunk(weight.group),
        "SCALE": weight.scale_kind,
        "ON_WEIGHTS": config.on_weights,
        "ROW": ROW_CODES[weight.row_kind],
        "HAS_ZERO": weight.zero.numel() > 0,
        "HAS_BIAS": has_bias,
        "CODES": CODES[weight.grid],
        "EVEN_K": weight.shape[1] % config.tile.block_k == 0,
        "CARRY": config.carry,
        "REGISTERS": config.registers,
        "SPLIT": config.split,
        "BLOCK_M": config.tile.block_m,
        "BLOCK_N": config.tile.block_n,
        "BLOCK_K": config.tile.block_k,
        "INTERPRET": interpreted(),
    }


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def aligned(x: Tensor) -> Tensor:
    """Return `x` `[m, k]` as kernels load it 16 bytes at a time: contiguous rows, starting at multiples of 16 bytes."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def ceil_div(a: int, b: int) -> int:
    """Return `a / b`, rounded up."""
    return -(-a // b)


class Counters:
    """Zeroed counters for partial sums: kernels leave them zero, so they are made once.

    Streams run at the same time and must not share counters, nor may graphs that could be replayed at the same time:
    every call made while a graph is captured gets its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[tuple[torch.device, int], Tensor] = {}
        self._arenas: dict[torch.device, tuple[Tensor, int]] = {}

    def reserve(self, device: torch.device) -> None:
        """Make the counters that graphs will take from; not possible any more once one is being captured."""
        with self._lock:
            if device not in self._arenas:
                self._arenas[device] = (torch.zeros(_ARENA, dtype=torch.int32, device=device), 0)

    def get(self, count: int, device: torch.device) -> Tensor:
        """Return at least `count` zeroed int32 counters for a call on the current stream."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        with self._lock:
            if torch.cuda.is_current_stream_capturing():
                arena, used = self._arenas.get(device, (torch.empty(0), 0))
                if used + count <= arena.numel():
                    self._arenas[device] = (arena, used + count)
                    return arena[used : used + count]
                return torch.zeros(count, dtype=torch.int32, device=device)  # the graph will zero them: a launch more
            key = (device, torch.cuda.current_stream(device).cuda_stream)
            if key not in self._streams or self._streams[key].numel() < count:
                self._streams[key] = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device)
            return self._streams[key]


COUNTERS = Counters()


def configuration(weight: RuntimeWeight, m: int, dtype: torch.dtype, device: torch.device, path: str) -> Config:
    """Return how to multiply `m` rows of activations on a device, by the tile table; see `tiles.configure`."""
    sm, processors = device_of(device)
    matches = weight.scale.dtype == dtype
    return configure(weight.grid, *weight.shape, weight.group, weight.scale_kind, matches, m, sm, processors, path)


def device_of(device: torch.device) -> tuple[int, int]:
    """Return a device's key of the tile tables and its multiprocessors; on a CPU what the interpreter pretends."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return architecture((properties.major, properties.minor)), properties.multi_processor_count


def _pointers(weight: RuntimeWeight) -> tuple[Tensor, ...]:
    """Return the tensors with words and bits in the unsigned dtypes the kernels compute in."""
    return (
        weight.words.view(torch.uint32),
        weight.bits.view(torch.uint16),
        weight.scale,
        weight.zero,
        weight.row,
        weight.table,
    )


def _bits_stride(weight: RuntimeWeight) -> int:
    """Return the elements between two rows of `bits`."""
    return weight.bits.stride(-2) if weight.bits.numel() else 0


def _scale_stride(weight: RuntimeWeight) -> int:
    """Return the elements between two chunks of scales (and zero points)."""
    return weight.scale.stride(-3) if weight.scale.numel() else 0


def _expert_strides(stack: RuntimeWeight) -> tuple[int, int, int, int]:
    """Return the elements between two experts' words, bits, scales and rows' scales."""
    return (
        stack.words.stride(0),
        stack.bits.stride(0) if stack.bits.numel() else 0,
        stack.scale.stride(0) if stack.scale.numel() else 0,
        stack.row.stride(0) if stack.row.numel() else 0,
    )
