# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: SIM300 - names of compile-time arguments are capitals
"""Activations times packed weights: decoded in registers tile by tile, weights as the left operand.

With weights on the left the matrix unit of sm_90 takes decoded tiles from registers, and the tile of activations may
be as narrow as eight rows. Work along K may be split over programs; then each writes a partial sum, and the last one to
arrive adds them in a fixed order, so that results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.gpu.decode import decode, scale_pairs
from compressor.kernels.gpu.lookup import load_table
from compressor.kernels.gpu.split import added, hand_in


@triton.jit(do_not_specialize=["m", "or0", "or1", "or2"])
def packed_matmul(
    x_ptr, words_ptr, bits_ptr, scale_ptr, zero_ptr, row_ptr, table_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    blocks_ptr, order_ptr,
    m, n, k, n_tiles, steps, x_stride_m, x_stride_k, words_stride, bits_stride, scale_stride, y_stride, words_expert,
    bits_expert, scale_expert, row_expert, per_token, or0, or1, or2, unit,
    GRID: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, SCALE: tl.constexpr, ON_WEIGHTS: tl.constexpr,
    ROW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, CODES: tl.constexpr, EVEN_K: tl.constexpr,
    CARRY: tl.constexpr, REGISTERS: tl.constexpr, SPLIT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute `y = x @ weight.T + bias` on a grid of `n_tiles * ceil(m / BLOCK_M)` times `SPLIT` programs.

    Weights are padded so that they need no masks; activations and results are masked. With `GROUPED` weights are stacks
    of experts, and a program multiplies rows that chose the same one: `y[r] = x[r // per_token] @ weight[expert].T`.

    Args:
        x_ptr: `[m, k]`, float16 or bfloat16.
        words_ptr: uint32 `[>= n, >= k / CODES]`.
        bits_ptr: uint16: one for each word of 3-bit codes; one for four words where two of four columns are kept.
        scale_ptr: `[groups / PER, >= n, PER]`: floats, E4M3 or shifted E8M0 bytes, by `SCALE`.
        zero_ptr: float16, of the same shape: zero code less zero point, if `HAS_ZERO`.
        row_ptr: float32 `[>= n]`: what whole rows are multiplied (`ROW` 1) or, with `e4m3`, divided (2) by.
        table_ptr: int32 `[3, 16]`, for tables; see `layout.table_words`.
        bias_ptr: `[n]`, if `HAS_BIAS`.
        y_ptr: `[m, n]` in the dtype of x.
        partial_ptr: float32 `[SPLIT, tiles, BLOCK_N, BLOCK_M]`, if `SPLIT > 1`.
        counter_ptr: int32 `[tiles]`, zero before and after, if `SPLIT > 1`.
        blocks_ptr: int32 `[blocks, 3]`, if `GROUPED`: the expert of `BLOCK_M` rows (-1: none), the place in `order` of
            the first, and the place behind the expert's last.
        order_ptr: int32, if `GROUPED`: rows of y sorted by expert.
        m: Rows of x.
        n: Rows of the weight.
        k: Columns of both.
        n_tiles: `ceil(n / BLOCK_N)`.
        steps: How many steps of `BLOCK_K` each of the `SPLIT` programs takes; the last may take fewer.
        x_stride_m: Elements between rows of x, and so on.
        x_stride_k: See `x_stride_m`.
        words_stride: See `x_stride_m`.
        bits_stride: See `x_stride_m`.
        scale_stride: See `x_stride_m`.
        y_stride: See `x_stride_m`.
        words_expert: Words between two experts, if `GROUPED`, and so on.
        bits_expert: See `words_expert`.
        scale_expert: See `words_expert`.
        row_expert: See `words_expert`.
        per_token: Rows of y that each row of x makes, if `GROUPED`.
        or0: See `decode`.
        or1: See `decode`.
        or2: See `decode`.
        unit: 1.0, but the compiler must not know.
        GRID: See `decode`.
        GROUP: Columns per scale; 0 if there are only rows'.
        PER: Groups of one row that lie next to each other.
        SCALE: `float`, `e4m3`, `e8m0`, or `none` if there are only rows'.
        ON_WEIGHTS: Multiply weights, not partial sums, by the scales.
        ROW: What `row_ptr` is for: 0 nothing.
        HAS_ZERO: Whether groups have zero points.
        HAS_BIAS: Whether there is a bias.
        CODES: Codes per word.
        EVEN_K: Whether `BLOCK_K` divides k.
        CARRY: Whether the matrix unit adds to the running sum itself; if not, each step's product is added to it.
        REGISTERS: Whether the matrix unit takes operands from registers alone.
        SPLIT: Programs that share the work along K.
        GROUPED: Whether weights are stacks of experts.
        BLOCK_M: Rows of x per program.
        BLOCK_N: Rows of the weight per program.
        BLOCK_K: Columns per step.
        INTERPRET: See `decode`.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, there = offs_m, offs_m < m
    if GROUPED:
        block_ptr = blocks_ptr + 3 * (tile // n_tiles)
        expert = tl.load(block_ptr).to(tl.int64)
        if expert < 0:
            return
        places = tl.load(block_ptr + 1) + tl.arange(0, BLOCK_M)
        there = places < tl.load(block_ptr + 2)
        offs_m = tl.load(order_ptr + places, mask=there, other=0)
        rows = offs_m // per_token
        words_ptr += expert * words_expert
        bits_ptr += expert * bits_expert
        scale_ptr += expert * scale_expert
        zero_ptr += expert * scale_expert
        row_ptr += expert * row_expert
        table_ptr += expert * 48
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // CODES)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(k, BLOCK_K))
    words_at = offs_n[:, None].to(tl.int64) * words_stride + (first * (BLOCK_K // CODES) + offs_w)[None, :]
    words_ptrs = words_ptr + words_at
    SPARSE: tl.constexpr = GRID == "float16-2of4" or GRID == "bfloat16-2of4"
    BITS: tl.constexpr = BLOCK_K // (4 * CODES if SPARSE else CODES)  # per row and step
    bits_at = offs_n[:, None].to(tl.int64) * bits_stride + (first * BITS + tl.arange(0, BITS))[None, :]
    bits_ptrs = bits_ptr + bits_at
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride_m + (first * BLOCK_K + offs_k)[None, :] * x_stride_k
    row = tl.full((BLOCK_N,), 1.0, tl.float32) * unit
    if ROW == 1:
        row = tl.load(row_ptr + offs_n)
    elif ROW == 2:
        row = 128.0 / tl.load(row_ptr + offs_n)  # `decode` and `scale_pairs` together leave 2**-7
    FLOAT: tl.constexpr = GRID == "e2m1" or GRID == "e3m0"
    # Powers of two that `decode` leaves: taken back on the sum, where float32 can hold what is in between.
    SCALED: tl.constexpr = ON_WEIGHTS or (FLOAT and DTYPE == tl.bfloat16)
    ON_SUMS: tl.constexpr = SCALE == "float" and not ON_WEIGHTS
    SUBNORMAL: tl.constexpr = DTYPE == tl.bfloat16 and (GRID == "int2" or GRID == "int4" or GRID == "int8")
    if FLOAT and not SCALED:
        row *= 32768.0
    elif SUBNORMAL and not HAS_ZERO:
        row *= 64.0
    if REGISTERS:
        # Where Triton finds a `join` before the operand of such a product, it gives it a layout that takes several
        # times the loads and a move for every register. It does not look into branches, so decoding is in one. The
        # assembler never sees it: it is told that there are rows.
        tl.assume(m > 0)
        # Zero, but the compiler must not know, and a register of every thread. An instruction takes one constant: the
        # mask; arguments are constants, too, and would cost an instruction more.
        nothing = ((offs_n + n) >> 31).to(tl.uint32)[:, None]
        or0, or1, or2 = nothing | or0.to(tl.uint32), nothing | or1.to(tl.uint32), nothing | or2.to(tl.uint32)
    table, factor = load_table(table_ptr, n, GRID, DTYPE, INTERPRET)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        words = tl.load(words_ptrs, eviction_policy="evict_first")
        bits = words
        if GRID == "int3" or GRID == "table3bit" or SPARSE:
            bits = tl.load(bits_ptrs, eviction_policy="evict_first").to(tl.uint32)
        mask = there[:, None]
        if not EVEN_K:
            mask = mask & (step * BLOCK_K + offs_k < k)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        zero = words
        if HAS_ZERO:
            zero = load_groups(zero_ptr, scale_stride, step, offs_n, GROUP, PER, BLOCK_K)
            zero = per_word(_pairs(zero, DTYPE), GROUP, CODES, BLOCK_K)
        scale = words
        if ON_WEIGHTS:
            scale = load_groups(scale_ptr, scale_stride, step, offs_n, GROUP, PER, BLOCK_K)
            scale = per_word(scale_pairs(scale, SCALE, DTYPE, INTERPRET), GROUP, CODES, BLOCK_K)
        elif SCALED:
            scale = tl.full((BLOCK_N, 1), 0x7F007F00, tl.uint32)  # 2**127, twice
        if REGISTERS:
            if m > 0:  # always, see above
                w = decode(words, bits, or0, or1, or2, table, zero, scale, GRID, HAS_ZERO, SCALED, DTYPE, INTERPRET)
                w = w.reshape(BLOCK_N, BLOCK_K)
            else:
                w = tl.zeros((BLOCK_N, BLOCK_K), DTYPE)
        else:
            w = decode(words, bits, or0, or1, or2, table, zero, scale, GRID, HAS_ZERO, SCALED, DTYPE, INTERPRET)
            w = w.reshape(BLOCK_N, BLOCK_K)
        if INTERPRET:
            x = x.to(tl.float32)
        if CARRY:
            acc = tl.dot(w, tl.trans(x), acc)
        elif ON_SUMS:
            scale = load_groups(scale_ptr, scale_stride, step, offs_n, GROUP, PER, BLOCK_K).reshape(BLOCK_N)
            acc += tl.dot(w, tl.trans(x)) * scale.to(tl.float32)[:, None]
        else:  # the product by a number unknown to the compiler keeps it from carrying the sum
            acc += tl.dot(w, tl.trans(x)) * row[:, None]
        words_ptrs += BLOCK_K // CODES
        bits_ptrs += BITS
        x_ptrs += BLOCK_K * x_stride_k
    if CARRY or (ON_SUMS and SUBNORMAL):
        acc *= row[:, None]
    if GRID == "table2bit" or GRID == "table3bit" or GRID == "table8" or GRID == "table16":
        acc *= factor
    if SPLIT == 1:
        _store(acc, bias_ptr, y_ptr, y_stride, offs_m, offs_n, there, n, HAS_BIAS)
    else:
        if hand_in(acc, partial_ptr, counter_ptr, tile, split, BLOCK_N, BLOCK_M) == SPLIT - 1:
            total = added(acc, partial_ptr, counter_ptr, tile, SPLIT, BLOCK_N, BLOCK_M)
            _store(total, bias_ptr, y_ptr, y_stride, offs_m, offs_n, there, n, HAS_BIAS)


@triton.jit
def _store(acc, bias_ptr, y_ptr, y_stride, offs_m, offs_n, there, n, HAS_BIAS: tl.constexpr):
    """Add the bias to `acc` `[n, m]`, round it once and write it `[m, n]`."""
    y = tl.trans(acc)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * y_stride + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=there[:, None] & (offs_n < n)[None, :])


@triton.jit
def load_groups(ptr, stride, step, offs_n, GROUP: tl.constexpr, PER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load what a step's groups have, `[rows, groups]`: several, or the one that the step lies in."""
    if GROUP == 0:
        return tl.load(ptr + offs_n)[:, None]
    elif GROUP >= BLOCK_K:
        group = step * BLOCK_K // GROUP
        return tl.load(ptr + (group // PER) * stride + offs_n * PER + group % PER)[:, None]
    else:
        groups = step * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
        return tl.load(ptr + offs_n[:, None] * PER + ((groups // PER) * stride + groups % PER)[None, :])


@triton.jit
def per_word(values, GROUP: tl.constexpr, CODES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Repeat values `[rows, groups]` for every word of a group: `[rows, words]`, or `[rows, 1]` if there is one."""
    if GROUP == 0 or GROUP >= BLOCK_K:
        return values
    else:
        shape: tl.constexpr = (values.shape[0], BLOCK_K // GROUP, GROUP // CODES)
        return tl.broadcast_to(values[:, :, None], shape).reshape(values.shape[0], BLOCK_K // CODES)


@triton.jit
def _pairs(values, DTYPE: tl.constexpr):
    """Return words with small integers, given in float16, in both halves as `DTYPE`."""
    if DTYPE == tl.bfloat16:
        return (values.to(tl.float32).to(tl.uint32, bitcast=True) >> 16) * 0x10001
    else:
        return values.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
