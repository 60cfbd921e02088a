# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Activations to integers or 8-bit floats, before a product of such.

One program per row: reorder, shift and scale channels, then find one scale for the row. Every operation rounds as
`compressor.inputs` does, so codes are the ones that are simulated there. LLM-FP4's small floats come out as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["clip"])
def quantize_rows(
    x_ptr, order_ptr, shift_ptr, factor_ptr, step_ptr, codes_ptr, scale_ptr, zero_ptr, k, columns, x_stride,
    codes_stride, clip,
    HAS_ORDER: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_FACTOR: tl.constexpr, STATIC: tl.constexpr,
    SYMMETRIC: tl.constexpr, FLOATING: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    MANTISSA: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Write the codes, scale and zero point of one row of `x` per program.

    A row with NaN gets the scale NaN, so that all its results are NaN, too.

    Args:
        x_ptr: `[m, k]`, any floating dtype; columns are contiguous.
        order_ptr: int32 `[k]`: which channel comes first, and so on, if `HAS_ORDER`.
        shift_ptr: float32 `[k]`, subtracted, if `HAS_SHIFT`.
        factor_ptr: float32 `[k]`, multiplied by afterwards, if `HAS_FACTOR`.
        step_ptr: float32 `[1]`, the scale of every row, if `STATIC`.
        codes_ptr: int8 `[m, columns]`, zero behind column k.
        scale_ptr: float32 `[m]`.
        zero_ptr: int32 `[m]`, the code of zero, if not `SYMMETRIC`.
        k: Columns of x.
        columns: Columns of the codes.
        x_stride: Elements between rows of x.
        codes_stride: Elements between rows of codes.
        clip: Share of the row's largest magnitude that its scale covers.
        HAS_ORDER: Whether channels are reordered.
        HAS_SHIFT: Whether they are shifted.
        HAS_FACTOR: Whether they are scaled.
        STATIC: Whether scales are stored.
        SYMMETRIC: Whether the grid reaches as far below zero as above.
        FLOATING: Whether codes are the bytes of E4M3 floats, not integers.
        BITS: Bits of a code.
        BLOCK: Columns per step.
        MANTISSA: Mantissa bits of small floats, which codes are as integers; -1 if they are none.
        OFFSET: See `rounding.Rounding`.
    """
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * x_stride
    codes_ptr += row.to(tl.int64) * codes_stride
    inside = tl.arange(0, BLOCK)
    high = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        v = _treated(x_ptr, order_ptr, shift_ptr, factor_ptr, start + inside, k, HAS_ORDER, HAS_SHIFT, HAS_FACTOR)
        wrong |= (v != v).to(tl.int32)
        if not STATIC:
            high = tl.maximum(high, v if not SYMMETRIC else tl.abs(v))
            if not SYMMETRIC:
                low = tl.minimum(low, v)
    scale, zero = grid_of(tl.max(high, 0), tl.min(low, 0), step_ptr, clip, STATIC, SYMMETRIC, FLOATING, BITS)
    if not SYMMETRIC and not STATIC:
        tl.store(zero_ptr + row, zero.to(tl.int32))
    for start in range(0, columns, BLOCK):
        offs = start + inside
        v = _treated(x_ptr, order_ptr, shift_ptr, factor_ptr, offs, k, HAS_ORDER, HAS_SHIFT, HAS_FACTOR)
        if MANTISSA < 0:
            code = codes_of(v, scale, zero, FLOATING, BITS)
        else:
            factor = tl.full((BLOCK,), 1.0, tl.float32)
            if HAS_FACTOR:
                factor = tl.load(factor_ptr + offs, mask=offs < k, other=1.0)
            code = _whole(tl.div_rn(v, tl.zeros_like(v) + scale), factor, BITS, MANTISSA, OFFSET)
        tl.store(codes_ptr + offs, tl.where(offs < k, code, 0).to(tl.int8), mask=offs < columns)
    if MANTISSA >= 0:
        scale *= 2.0 ** (1 - MANTISSA - OFFSET)
    tl.store(scale_ptr + row, tl.where(tl.max(wrong, 0) > 0, float("nan"), scale))


@triton.jit
def _treated(
    x_ptr, order_ptr, shift_ptr, factor_ptr, offs, k,
    HAS_ORDER: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """Return columns of a row as float32 after each operation has rounded them to the dtype of x; 0 behind column k."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    there = offs < k
    where = offs
    if HAS_ORDER:
        where = tl.load(order_ptr + offs, mask=there, other=0)
    v = tl.load(x_ptr + where, mask=there, other=0.0).to(tl.float32)
    return moved(v, shift_ptr, factor_ptr, offs, k, HAS_SHIFT, HAS_FACTOR, DTYPE)


@triton.jit
def moved(
    v, shift_ptr, factor_ptr, offs, k, HAS_SHIFT: tl.constexpr, HAS_FACTOR: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Shift and scale columns `offs` of float32 `v` `[..., columns]`, rounding to `DTYPE` after each."""
    there = offs < k
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + offs, mask=there, other=0.0)
        v = (v - shift.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + offs, mask=there, other=0.0)
        v = (v * factor.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    return v


@triton.jit
def grid_of(
    high, low, step_ptr, clip, STATIC: tl.constexpr, SYMMETRIC: tl.constexpr, FLOATING: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Return scale and zero point, float32, of rows that reach from `low` to `high`, or to `high` on both sides."""
    zero = tl.zeros_like(high)
    if STATIC:
        scale = zero + tl.load(step_ptr)
    elif SYMMETRIC:
        scale = _positive(
            tl.div_rn(high * clip, tl.full(high.shape, 448.0 if FLOATING else (2.0**BITS - 1) / 2, tl.float32))
        )
    else:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        bottom = low * clip
        scale = _positive(tl.div_rn(high * clip - bottom, tl.full(high.shape, 2.0**BITS - 1, tl.float32)))
        zero = _round(_clamp(-HALF - tl.div_rn(bottom, scale), HALF))
    return scale, zero


@triton.jit
def codes_of(v, scale, zero, FLOATING: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of float32 `v`, int32; scale and zero point may be broadcast."""
    z = tl.div_rn(v, tl.zeros_like(v) + scale)
    return _e4m3(z) if FLOATING else _round(_clamp(z + zero, 2 ** (BITS - 1))).to(tl.int32)


@triton.jit
def _whole(z, factor, BITS: tl.constexpr, MANTISSA: tl.constexpr, OFFSET: tl.constexpr):
    """Round float32 `z` to small floats at bias 0, ties to even; return them as integers, int32.

    In units of the smallest, `2^(1 - MANTISSA)`, times `2^OFFSET / factor`. All steps but the rounding are exact.
    """
    EXPONENTS: tl.constexpr = 2 ** (BITS - 1 - MANTISSA)
    LARGEST: tl.constexpr = (2 - 2.0**-MANTISSA) * 2.0 ** (EXPONENTS - 1)
    z = tl.minimum(tl.maximum(z, -LARGEST), LARGEST)
    binade = tl.maximum((z.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 2.0)
    count = _round(tl.div_rn(z * 2.0**MANTISSA, binade))
    return (count * binade * tl.div_rn(tl.full(z.shape, 2.0 ** (OFFSET - 1), tl.float32), factor)).to(tl.int32)


@triton.jit
def _positive(scale):
    return tl.where(scale == 0, 1.1920928955078125e-07, scale)


@triton.jit
def _clamp(z, HALF: tl.constexpr):
    return tl.minimum(tl.maximum(z, -HALF), HALF - 1)


@triton.jit
def _round(z):
    """Round to the nearest integer, ties to even: what adding a number of magnitude 1.5 * 2**23 does."""
    return (z + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(z):
    """Return the byte of the E4M3 float nearest to float32 `z`, at most 448, ties to even, as int32."""
    size = tl.minimum(tl.abs(z), 448.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    # In units of the last place the value is a whole number of at most 16; 16 is the next exponent's 8.
    count = _round(size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.int32)
    sign = (z.to(tl.int32, bitcast=True) >> 31) & 0x80
    return (((exponent + 7) << 3) + count - 8) | sign
