# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

"""Integer activations times integer weights, exact in int32; scales are multiplied once, at the end or per group.

As in `matmul.py` weights are the left operand, and programs may share the work along K. Weights of 8 bits go to the
matrix unit as they lie in memory. Those of 4 bits lie in two's complement, 64 columns in the low nibbles of 64 bytes
and the next 64 in the high ones: a shift and a mask leave bytes that are 16 times the weight, which is taken back at
the end. So there are two products per step, one for each half of the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.gpu.split import added, hand_in


@triton.jit(do_not_specialize=["m"])
def int_matmul(
    x_ptr, words_ptr, x_scale_ptr, x_zero_ptr, scale_ptr, sum_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    m, n, n_tiles, steps, all_steps, x_stride, words_stride, group_stride, y_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute `y = ((x - x_zero) * x_scale) @ weight.T + bias`, programs as in `matmul.packed_matmul`.

    Weights and activations are padded along K with zeros and need no masks there.

    Args:
        x_ptr: int8 `[m, >= k]`.
        words_ptr: int8 `[>= n, columns]`, or `[>= n, columns / 2]` of 4-bit weights.
        x_scale_ptr: float32 `[m]`.
        x_zero_ptr: int32 `[m]`, the code of zero, if `HAS_ZERO`.
        scale_ptr: float32 `[>= n]`, or `[groups, >= n]`.
        sum_ptr: The sum of every row's integers, int32 `[>= n]`; with groups, of integers times scales, float32.
        bias_ptr: `[n]`, if `HAS_BIAS`.
        y_ptr: `[m, n]`.
        partial_ptr: int32 (float32 with groups) `[SPLIT, tiles, BLOCK_N, BLOCK_M]`, if `SPLIT > 1`.
        counter_ptr: int32 `[tiles]`, zero before and after, if `SPLIT > 1`.
        m: Rows of x.
        n: Rows of the weight.
        n_tiles: `ceil(n / BLOCK_N)`.
        steps: How many steps of `BLOCK_K` each of the `SPLIT` programs takes; the last may take fewer.
        all_steps: Steps of all of them.
        x_stride: Elements between rows of x, and so on.
        words_stride: See `x_stride`.
        group_stride: Elements between the scales of two groups.
        y_stride: See `x_stride`.
        BITS: 4 or 8.
        GROUP: Columns per scale, a multiple of `BLOCK_K`; 0 for whole rows. Of 4-bit weights also other multiples of
            64, with a `BLOCK_K` of 128.
        HAS_ZERO: Whether activations have zero points.
        HAS_BIAS: Whether there is a bias.
        SPLIT: Programs that share the work along K.
        BLOCK_M: Rows of x per program.
        BLOCK_N: Rows of the weight per program.
        BLOCK_K: Columns per step, of 4-bit weights a multiple of 128.
        INTERPRET: Whether the interpreter runs this.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    BYTES: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    bytes_in = tl.arange(0, BYTES)
    first = split * steps
    last = tl.minimum(first + steps, all_steps)
    words_ptrs = words_ptr + offs_n[:, None].to(tl.int64) * words_stride + (first * BYTES + bytes_in)[None, :]
    x_at = bytes_in
    if BITS == 4:
        x_at = bytes_in // 64 * 128 + bytes_in % 64
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * x_stride + (first * BLOCK_K + x_at)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else tl.int32)
    for step in range(first, last):
        w = tl.load(words_ptrs, eviction_policy="evict_first")
        x = tl.load(x_ptrs, mask=(offs_m < m)[:, None], other=0)
        if GROUP:
            scale_at = scale_ptr + offs_n
            scale = tl.load(scale_at + (step * BLOCK_K // GROUP) * group_stride)[:, None]
        if BITS == 4:
            low, high = _nibbles(w, INTERPRET)
            x_high = tl.load(x_ptrs + 64, mask=(offs_m < m)[:, None], other=0)
            if GROUP % BLOCK_K != 0:  # the two halves may lie in two groups
                high_scale = tl.load(scale_at + ((step * BLOCK_K + 64) // GROUP) * group_stride)[:, None]
                acc += tl.dot(low, tl.trans(x), out_dtype=tl.int32).to(tl.float32) * scale
                acc += tl.dot(high, tl.trans(x_high), out_dtype=tl.int32).to(tl.float32) * high_scale
            elif GROUP:
                part = tl.dot(low, tl.trans(x), out_dtype=tl.int32)
                part = tl.dot(high, tl.trans(x_high), part, out_dtype=tl.int32)
                acc += part.to(tl.float32) * scale
            else:
                acc = tl.dot(low, tl.trans(x), acc, out_dtype=tl.int32)
                acc = tl.dot(high, tl.trans(x_high), acc, out_dtype=tl.int32)
        elif GROUP:
            acc += tl.dot(w, tl.trans(x), out_dtype=tl.int32).to(tl.float32) * scale
        else:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        words_ptrs += BYTES
        x_ptrs += BLOCK_K
    if SPLIT == 1:
        _store_scaled(
            acc, x_scale_ptr, x_zero_ptr, scale_ptr, sum_ptr, bias_ptr, y_ptr, y_stride, offs_m, offs_n, m, n, BITS,
            GROUP, HAS_ZERO, HAS_BIAS,
        )  # fmt: skip
    else:
        if hand_in(acc, partial_ptr, counter_ptr, tile, split, BLOCK_N, BLOCK_M) == SPLIT - 1:
            total = added(acc, partial_ptr, counter_ptr, tile, SPLIT, BLOCK_N, BLOCK_M)
            _store_scaled(
                total, x_scale_ptr, x_zero_ptr, scale_ptr, sum_ptr, bias_ptr, y_ptr, y_stride, offs_m, offs_n, m, n,
                BITS, GROUP, HAS_ZERO, HAS_BIAS,
            )  # fmt: skip


@triton.jit
def _store_scaled(
    acc, x_scale_ptr, x_zero_ptr, scale_ptr, sum_ptr, bias_ptr, y_ptr, y_stride, offs_m, offs_n, m, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Turn sums of integers `[n, m]` into results, rounded once, and write them `[m, n]`."""
    there = offs_m < m
    if BITS == 4:  # exact: all products are multiples of 16
        if GROUP:
            acc *= 0.0625
        else:
            acc = acc >> 4
    if HAS_ZERO:
        zero = tl.load(x_zero_ptr + offs_m, mask=there, other=0)[None, :]
        sums = tl.load(sum_ptr + offs_n)[:, None]
        if GROUP:
            acc -= zero.to(tl.float32) * sums
        else:
            acc -= zero * sums
    y = acc.to(tl.float32)
    y *= tl.load(x_scale_ptr + offs_m, mask=there, other=0.0)[None, :]
    if GROUP == 0:
        y *= tl.load(scale_ptr + offs_n)[:, None]
    y = tl.trans(y)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * y_stride + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=there[:, None] & (offs_n < n)[None, :])


@triton.jit
def _nibbles(w, INTERPRET: tl.constexpr):
    """Return the low and the high nibbles of int8 bytes, each times 16."""
    if INTERPRET:
        return (w.to(tl.int32) << 4).to(tl.int8), w & -16
    else:  # four bytes at a time, which the compiler does not find by itself
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r",
            [w],
            (tl.int8, tl.int8),
            True,
            4,
        )
