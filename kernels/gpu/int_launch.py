"""Starting the integer kernels: codes for activations, then the product; as in `launch.py` nothing waits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.inputs import Rotate
from compressor.kernels.gpu.int_weight import IntWeight
from compressor.kernels.gpu.launch import COUNTERS, ceil_div, device_of, interpreted
from compressor.kernels.gpu.layout import PAD_COLUMNS, PAD_ROWS
from compressor.kernels.gpu.rounding import Rounding
from compressor.kernels.gpu.tiles import Tile, split_for

QUANTIZE_COLUMNS = 4096
"""Most columns that a program of `quantize_rows` has in registers."""

ROTATE_ROWS, ROTATE_COLUMNS = 16, 256
"""Rows of a program of `quantize_rotated`, as few as the matrix unit takes, and columns that it rounds at once."""

_LIMITED = 89
"""The architecture with the least shared memory."""


def int_tile(bits: int, columns: int, rows: int, group: int, m: int, sm: int) -> Tile:
    """Return the sizes of a program; not measured, chosen among compiled ones.

    Args:
        bits: 4 or 8.
        columns: Columns of the weight, padded.
        rows: Its rows, padded.
        group: Columns per scale; 0 for whole rows.
        m: Rows of activations.
        sm: See `tiles.architecture`.
    """
    block_m = next((size for size in (16, 32, 64) if m <= size), 128)
    warps = 8 if block_m == 128 or (group and block_m == 64) else 4
    tile = Tile(block_m, 128, 256 if bits == 4 and block_m < 64 and not group else 128, warps, 4)
    if sm == _LIMITED or block_m == 128:
        tile = replace(tile, stages=3)
    if rows % tile.block_n:
        tile = replace(tile, block_n=PAD_ROWS)
    if columns % tile.block_k:
        tile = replace(tile, block_k=PAD_COLUMNS)
    if bits == 8 and group % tile.block_k:
        tile = replace(tile, block_k=PAD_COLUMNS // 2)
    return tile


def quantize(x: Tensor, rounding: Rounding, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `rounding.codes_of` returns for `x` `[m, k]`, codes padded with zeros to so many columns."""
    from compressor.kernels.gpu.quantize import quantize_rows

    if rounding.matrix is not None and x.dtype == torch.float32:  # sums in float32 belong to no matrix unit
        turned = x.index_select(-1, rounding.order) if rounding.order.numel() else x
        turned = Rotate(rounding.matrix).apply(turned)
        return quantize(turned, replace(rounding, matrix=None, order=rounding.order[:0]), columns)
    m, k = x.shape
    codes = torch.empty(m, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = torch.empty(0 if rounding.symmetric else m, dtype=torch.int32, device=x.device)
    if m == 0:
        return codes, scale, zero
    step, order, shift, factor = (tensor if tensor.numel() else scale for tensor in rounding.tensors)
    if rounding.matrix is not None:
        _rotated(x, rounding, codes, scale, zero)
        return codes, scale, zero
    block = min(QUANTIZE_COLUMNS, 1 << (columns - 1).bit_length())
    quantize_rows[(m,)](
        x, order, shift, factor, step, codes, scale, scale if rounding.symmetric else zero, k, columns, x.stride(0),
        codes.stride(0), rounding.clip,
        HAS_ORDER=rounding.order.numel() > 0, HAS_SHIFT=rounding.shift.numel() > 0,
        HAS_FACTOR=rounding.factor.numel() > 0, STATIC=rounding.step.numel() > 0, SYMMETRIC=rounding.symmetric,
        FLOATING=rounding.floating, BITS=rounding.bits, BLOCK=block,
        MANTISSA=-1 if rounding.mantissa is None else rounding.mantissa, OFFSET=rounding.offset,
        num_warps=8 if block > 1024 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, zero


def _rotated(x: Tensor, rounding: Rounding, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
    """Fill what `quantize` returns with a kernel that turns blocks of channels on the way."""
    from compressor.kernels.gpu.rotate import quantize_rotated

    assert rounding.matrix is not None, "asked before"
    (m, k), columns, size = x.shape, codes.shape[1], rounding.matrix.shape[0]
    _, processors = device_of(x.device)
    tiles = ceil_div(m, ROTATE_ROWS)
    steps = ceil_div(k // size, min(k // size, max(1, 2 * processors // tiles)))
    split = ceil_div(k // size, steps)
    turned = torch.empty(m, k, dtype=x.dtype, device=x.device)
    ranges = torch.empty(split, 2, tiles * ROTATE_ROWS, dtype=torch.float32, device=x.device)
    counters = COUNTERS.get(tiles, x.device) if split > 1 else scale
    step, order, shift, factor = (tensor if tensor.numel() else scale for tensor in rounding.tensors)
    quantize_rotated[(tiles, split)](
        x, order, rounding.matrix.contiguous(), shift, factor, step, turned, ranges, counters, codes, scale,
        zero if zero.numel() else scale, m, k, columns, steps, x.stride(0), codes.stride(0), rounding.clip,
        HAS_ORDER=rounding.order.numel() > 0, HAS_SHIFT=rounding.shift.numel() > 0,
        HAS_FACTOR=rounding.factor.numel() > 0, STATIC=rounding.step.numel() > 0, SYMMETRIC=rounding.symmetric,
        FLOATING=rounding.floating, BITS=rounding.bits, SPLIT=split, SIZE=size, BLOCK_M=ROTATE_ROWS,
        BLOCK=min(ROTATE_COLUMNS, 1 << (columns - 1).bit_length()), INTERPRET=interpreted(), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def int_matmul(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: IntWeight,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
    split: int = 0,
) -> Tensor:
    """Write `((codes - zero) * scale) @ weight.T + bias` to `out` `[m, n]`, whose rows are contiguous.

    Args:
        codes: From `quantize`, as the next two; `zero` is empty for symmetric grids.
        scale: See `codes`.
        zero: See `codes`.
        weight: On their device.
        bias: `[n]` or None.
        out: Of any floating dtype.
        tile: Sizes of a program; by `int_tile` if None.
        split: Programs that share the work along K; 0: as many as fill the device.
    """
    from compressor.kernels.gpu.int_matmul import int_matmul as kernel

    m, n = out.shape
    if m == 0:
        return out
    columns = codes.shape[1]
    sm, processors = device_of(codes.device)
    tile = tile or int_tile(weight.bits, columns, weight.words.shape[0], weight.group, m, sm)
    n_tiles, steps = ceil_div(n, tile.block_n), columns // tile.block_k
    tiles = n_tiles * ceil_div(m, tile.block_m)
    split = split or split_for(tiles, steps, processors)
    partial, counters = out, out
    if split > 1:
        dtype = torch.float32 if weight.group else torch.int32
        partial = torch.empty(split * tiles * tile.block_n * tile.block_m, dtype=dtype, device=codes.device)
        counters = COUNTERS.get(tiles, codes.device)
    kernel[(tiles, split)](
        codes, weight.words, scale, zero if zero.numel() else scale, weight.scale, weight.sums,
        out if bias is None else bias, out, partial, counters, m, n, n_tiles, ceil_div(steps, split), steps,
        codes.stride(0), weight.words.stride(0), weight.scale.stride(0) if weight.group else 0, out.stride(0),
        BITS=weight.bits, GROUP=weight.group, HAS_ZERO=zero.numel() > 0, HAS_BIAS=bias is not None, SPLIT=split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, INTERPRET=interpreted(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
