# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Activations turned block by block and rounded to integers or 8-bit floats, in one launch.

As `quantize.py`, with a product in the middle: channels are reordered while they are loaded, blocks of them are
multiplied by one matrix that stays in registers, and the result, rounded to the dtype of the inputs, waits in memory
until the rows' ranges are known. Several programs share the columns of a few rows; the last one to arrive makes the
codes, so that a single row keeps the device busy, too. Ranges do not depend on who that is.

Products of 16-bit numbers are exact in float32; only the order of their sums is the matrix unit's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.gpu.quantize import codes_of, grid_of, moved


@triton.jit(do_not_specialize=["m", "clip"])
def quantize_rotated(
    x_ptr, order_ptr, matrix_ptr, shift_ptr, factor_ptr, step_ptr, turned_ptr, range_ptr, counter_ptr, codes_ptr,
    scale_ptr, zero_ptr, m, k, columns, steps, x_stride, codes_stride, clip,
    HAS_ORDER: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_FACTOR: tl.constexpr, STATIC: tl.constexpr,
    SYMMETRIC: tl.constexpr, FLOATING: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write codes, scales and zero points of `BLOCK_M` rows, on a grid of `ceil(m / BLOCK_M)` times `SPLIT` programs.

    Arguments that are not here are those of `quantize.quantize_rows`.

    Args:
        x_ptr: `[m, k]`, float16 or bfloat16; columns are contiguous.
        matrix_ptr: `[SIZE, SIZE]`, any floating dtype: every block of channels is multiplied by it.
        turned_ptr: `[m, k]` of the dtype of x, for what is between.
        range_ptr: float32 `[SPLIT, 2, rows]`, for the ends of rows' ranges, `rows` being a multiple of `BLOCK_M`.
        counter_ptr: int32 `[ceil(m / BLOCK_M)]`, zero before and after, if `SPLIT > 1`.
        steps: How many blocks each program turns; the last one may turn fewer.
        SPLIT: Programs that share some rows.
        SIZE: Columns of a block.
        BLOCK_M: Rows of a program.
        BLOCK: Columns that are rounded at once.
        INTERPRET: Whether the interpreter runs this, which multiplies in float32.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (rows < m)[:, None]
    inside = tl.arange(0, SIZE)
    matrix = tl.load(matrix_ptr + inside[:, None] * SIZE + inside[None, :]).to(DTYPE)
    if INTERPRET:
        matrix = matrix.to(tl.float32)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride
    turned_ptrs = turned_ptr + rows[:, None].to(tl.int64) * k
    high = tl.zeros((BLOCK_M, SIZE), tl.float32)
    low = tl.zeros((BLOCK_M, SIZE), tl.float32)
    wrong = tl.zeros((BLOCK_M, SIZE), tl.int32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, k // SIZE)):
        offs = step * SIZE + inside
        where = offs
        if HAS_ORDER:
            where = tl.load(order_ptr + offs)
        x = tl.load(x_ptrs + where[None, :], mask=there, other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
        v = tl.dot(x, matrix).to(DTYPE).to(tl.float32)
        v = moved(v, shift_ptr, factor_ptr, offs, k, HAS_SHIFT, HAS_FACTOR, DTYPE)
        tl.store(turned_ptrs + offs[None, :], v.to(DTYPE), mask=there)
        wrong |= (v != v).to(tl.int32)
        high = tl.maximum(high, v if not SYMMETRIC else tl.abs(v))
        low = tl.minimum(low, v)
    top = tl.where(tl.max(wrong, 1) > 0, float("nan"), tl.max(high, 1))
    places = range_ptr + tl.num_programs(0) * BLOCK_M * 2 * split + rows
    tl.store(places, top)
    tl.store(places + tl.num_programs(0) * BLOCK_M, tl.min(low, 1))
    tl.debug_barrier()  # every thread's part is written before one of them says so, or reads others' parts
    last = True
    if SPLIT > 1:
        last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        _round_rows(
            turned_ptr, range_ptr, step_ptr, codes_ptr, scale_ptr, zero_ptr, rows, m, k, columns, codes_stride, clip,
            STATIC, SYMMETRIC, FLOATING, BITS, SPLIT, BLOCK_M, BLOCK,
        )  # fmt: skip
        if SPLIT > 1:
            tl.store(counter_ptr + tile, 0)


@triton.jit
def _round_rows(
    turned_ptr, range_ptr, step_ptr, codes_ptr, scale_ptr, zero_ptr, rows, m, k, columns, codes_stride, clip,
    STATIC: tl.constexpr, SYMMETRIC: tl.constexpr, FLOATING: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round rows that have been turned, with scales for the ranges that `SPLIT` programs found; see there."""
    high = tl.zeros((BLOCK_M,), tl.float32)
    low = tl.zeros((BLOCK_M,), tl.float32)
    wrong = tl.zeros((BLOCK_M,), tl.int32)
    for other in range(SPLIT):
        places = range_ptr + tl.num_programs(0) * BLOCK_M * 2 * other + rows
        part = tl.load(places, cache_modifier=".cg")
        wrong |= (part != part).to(tl.int32)
        high = tl.maximum(high, part)
        low = tl.minimum(low, tl.load(places + tl.num_programs(0) * BLOCK_M, cache_modifier=".cg"))
    scale, zero = grid_of(high, low, step_ptr, clip, STATIC, SYMMETRIC, FLOATING, BITS)
    there = rows < m
    if not SYMMETRIC and not STATIC:
        tl.store(zero_ptr + rows, zero.to(tl.int32), mask=there)
    tl.store(scale_ptr + rows, tl.where(wrong > 0, float("nan"), scale), mask=there)
    at = rows[:, None].to(tl.int64)
    for start in range(0, columns, BLOCK):
        offs = (start + tl.arange(0, BLOCK))[None, :]
        v = tl.load(turned_ptr + at * k + offs, mask=there[:, None] & (offs < k), other=0.0, cache_modifier=".cg")
        code = codes_of(v.to(tl.float32), scale[:, None], zero[:, None], FLOATING, BITS)
        code = tl.where(offs < k, code, 0).to(tl.int8)
        tl.store(codes_ptr + at * codes_stride + offs, code, mask=there[:, None] & (offs < columns))
