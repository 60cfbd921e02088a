# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: SIM300 - names of compile-time arguments are capitals
"""Turning packed words into 16-bit floating-point weights inside a kernel, with as few instructions as it takes.

A word holds pairs of weights that are neighbours along K, one in each 16-bit half, so that a mask of the word is the
register the matrix unit reads (`layout.py` defines the bits). In float16 integers are put under a constant exponent:
with a code at mantissa bit `p` the half reads `2**(M - p) + code`, M mantissa bits, and one subtraction, exact in the
same dtype, leaves the code. In bfloat16, whose mantissa is too short for that, they are left where they are: a half
less than 256 reads as that many times the smallest subnormal number, so that one multiply-add by a power of two makes
the code less its offset, times `2**-6` (larger powers of two than `2**127` there are not). Small floats are moved under
the exponent field of the target; what that does to their value is a power of two, which the multiplication by the scale
takes back.

The constants OR-ed in (`or0` to `or2`) are kernel arguments, not literals: a three-input logic instruction takes one
literal, and with two the assembler spends a second instruction on every pair.

Table indices are looked up by byte permutations, see `lookup.py`.

Triton's interpreter cannot compute in bfloat16. There (`INTERPRET`) the same bits are widened to float32, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.gpu.lookup import eight, four, look_up, look_up2, look_up3, spread


@triton.jit
def decode(
    words, bits, or0, or1, or2, table, zero, scale,
    GRID: tl.constexpr, HAS_ZERO: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the weights of every word, `[rows, words, codes per word / 2, 2]` in `DTYPE`: K order when flattened.

    Where two of four columns are kept, it is `[rows, words / 4, 8, 2]`.

    Unscaled integers come out as code less zero code, plus `zero`; in bfloat16 those of `int2`, `int4` and `int8` times
    `2**-6` unless `HAS_ZERO`. Unscaled small floats come out times `2**-15` in float16 and `2**-127` in bfloat16, those
    of `e2m1` as one of 0, 1, 2, 3, 4, 6, 8, 12. Table entries are as `layout.table_words` rounds and scales them.

    Args:
        words: uint32 `[rows, words]`.
        bits: What 3-bit codes have beside words, 16 bits for each, uint32 `[rows, words]`; with two of four columns
            kept, their patterns, uint32 `[rows, words / 4]`; unused for other grids.
        or0: Constants of the grid and dtype, `layout.constants`.
        or1: See `or0`.
        or2: See `or0`.
        table: From `load_table`, for tables.
        zero: Zero code less zero point, in both halves of words, broadcastable to `words`; used if `HAS_ZERO`.
        scale: What weights are multiplied by, from `scale_pairs`, likewise; used if `SCALED`.
        GRID: A key of `layout.CODES`.
        HAS_ZERO: Whether to add `zero`.
        SCALED: Whether to multiply by `scale`.
        DTYPE: `tl.float16` or `tl.bfloat16`.
        INTERPRET: Whether the interpreter runs this; values are float32 then.
    """
    if GRID == "int4":
        pairs, factors, offsets = _int4(words, or0, or1, DTYPE)
    elif GRID == "int2":
        pairs, factors, offsets = _int2(words, or0, or1, or2, DTYPE)
    elif GRID == "int3":
        pairs, factors, offsets = _int3(words, bits, or0, or1, or2, DTYPE)
    elif GRID == "int8":
        pairs, factors, offsets = _int8(words, or0, DTYPE)
    elif GRID == "e2m1":
        pairs = _float4(words, or0, or1, 0, 3, 6, 9, 13, 12, 15, 14, 6 if DTYPE == tl.bfloat16 else 9)
        factors, offsets = pairs, pairs
    elif GRID == "float16-2of4" or GRID == "bfloat16-2of4":
        pairs = spread(words, bits, INTERPRET)
        factors, offsets = pairs, pairs
    elif GRID == "table2bit":
        pairs = look_up2(words, table, INTERPRET)
        factors, offsets = pairs, pairs
    elif GRID == "table3bit":
        pairs = look_up3(words, bits, table, INTERPRET)
        factors, offsets = pairs, pairs
    elif GRID == "table8" or GRID == "table16":
        pairs = look_up(words, table, GRID == "table16", INTERPRET)
        factors, offsets = pairs, pairs
    else:
        tl.static_assert(GRID == "e3m0", "unknown grid")
        pairs = _float4(words, or0, or1, 0, 3, 7, 12, 6, 11, 15, 10, 7 if DTYPE == tl.bfloat16 else 10)
        factors, offsets = pairs, pairs
    INTEGER: tl.constexpr = GRID == "int2" or GRID == "int3" or GRID == "int4" or GRID == "int8"
    SPARSE: tl.constexpr = GRID == "float16-2of4" or GRID == "bfloat16-2of4"
    UNITS: tl.constexpr = words.shape[1] // 4 if SPARSE else words.shape[1]
    SHAPE: tl.constexpr = (words.shape[0], UNITS, pairs.numel // (words.shape[0] * UNITS))
    SUBNORMAL: tl.constexpr = DTYPE == tl.bfloat16 and INTEGER and GRID != "int3"
    pairs = pairs.reshape(SHAPE)
    factors = factors.reshape(SHAPE)
    offsets = offsets.reshape(SHAPE)
    if INTERPRET:
        values = _halves(pairs, DTYPE, INTERPRET)
        if INTEGER:
            values = values * _halves(factors, DTYPE, INTERPRET) + _halves(offsets, DTYPE, INTERPRET)
        if HAS_ZERO:
            values = values * (64.0 if SUBNORMAL else 1.0) + _halves(zero, DTYPE, INTERPRET)[:, :, None, :]
        if SCALED:
            values *= _halves(scale, DTYPE, INTERPRET)[:, :, None, :]
        return values
    else:
        WHOLE: tl.constexpr = 0x42804280 if SUBNORMAL else 0x3F803F80 if DTYPE == tl.bfloat16 else 0x3C003C00  # 64 or 1
        if INTEGER:
            pairs = _fma(pairs, factors, offsets, DTYPE)
        if HAS_ZERO:
            pairs = _fma(pairs, tl.full((), WHOLE, tl.uint32), zero[:, :, None], DTYPE)
        if SCALED:
            pairs = _fma(pairs, scale[:, :, None], tl.full((), 0x80008000, tl.uint32), DTYPE)
        return _halves(pairs, DTYPE, INTERPRET)


@triton.jit
def _fma(a, b, c, DTYPE: tl.constexpr):
    """Return `a * b + c` on both halves of words, rounded once."""
    # Not left to the compiler, which vectorises products of tensors only where it finds them worth the packing.
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.uint32, True, 1)
    else:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.uint32, True, 1)


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Read both halves of each word as numbers, `[..., 2]`."""
    return tl.join(as_float(pairs & 0xFFFF, DTYPE, INTERPRET), as_float(pairs >> 16, DTYPE, INTERPRET))


@triton.jit
def as_float(half, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Read the low 16 bits of each word as `DTYPE`."""
    if INTERPRET:
        if DTYPE == tl.bfloat16:
            return (half << 16).to(tl.float32, bitcast=True)
        else:
            return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return half.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def scale_pairs(raw, SCALE: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return stored scales in both halves of words, as multipliers of what `decode` makes of codes.

    Args:
        raw: Scales as `layout.RuntimeWeight` holds them, of any shape.
        SCALE: `float`: `raw` is of `DTYPE`. `e8m0`: bytes with 254 for the row's largest scale; its pair is `2**15` in
            float16 and `2**127` in bfloat16, which undoes what `decode` leaves. `e4m3`: non-negative E4M3 bytes; the
            pair is the scale times `2**7` or `2**119`.
    """
    if SCALE == "e8m0":
        if DTYPE == tl.bfloat16:
            return raw.to(tl.uint32) * 0x00800080
        else:  # powers of two further apart than float16 reaches vanish beside the row's largest
            return tl.maximum(raw.to(tl.int32) - 224, 0).to(tl.uint32) * 0x04000400
    elif SCALE == "e4m3":
        pairs = raw.to(tl.uint32) * (0x00100010 if DTYPE == tl.bfloat16 else 0x00800080)
        if DTYPE == tl.bfloat16:  # 2**120 gives the scale itself: E4M3's exponent bias is 7
            return _times(_times(pairs, 0x7B80, DTYPE, INTERPRET), 0x7B00, DTYPE, INTERPRET)
        else:
            return _times(pairs, 0x7800, DTYPE, INTERPRET)
    else:
        tl.static_assert(raw.dtype == DTYPE, "scales multiply weights of their own dtype")
        return raw.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def _times(pairs, factor: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Multiply equal halves by a power of two, given as the bits of `DTYPE`."""
    if INTERPRET:
        value = as_float(pairs & 0xFFFF, DTYPE, INTERPRET) * as_float(tl.full((), factor, tl.uint32), DTYPE, INTERPRET)
        if DTYPE == tl.bfloat16:
            return (value.to(tl.uint32, bitcast=True) >> 16) * 0x10001
        else:
            return value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
    else:
        return _fma(pairs, tl.full((), factor * 0x10001, tl.uint32), tl.full((), 0x80008000, tl.uint32), DTYPE)


@triton.jit
def _like(words, value: tl.constexpr):
    """Fill a tensor of the shape of `words` with the bits of `value` in both halves."""
    return tl.full(words.shape, value * 0x10001, tl.uint32)


@triton.jit
def _one(words, DTYPE: tl.constexpr):
    return _like(words, 0x3F80 if DTYPE == tl.bfloat16 else 0x3C00)


@triton.jit
def _int4(words, or0, or1, DTYPE: tl.constexpr):
    top = words >> 8
    p0, p1, p2, p3 = words & 0x000F000F, words & 0x00F000F0, top & 0x000F000F, top & 0x00F000F0
    if DTYPE == tl.bfloat16:
        f0, f1 = _like(words, 0x7F00), _like(words, 0x7D00)  # 2**127, 2**123
        eight = _like(words, 0xBE00)  # -8 * 2**-6
        return four(p0, p1, p2, p3), four(f0, f1, f0, f1), four(eight, eight, eight, eight)
    else:
        one = _one(words, DTYPE)
        even, odd = _like(words, 0xE408), _like(words, 0xD480)  # -(1024 + 8), -(64 + 8)
        pairs = four(p0 | or0, p1 | or1, p2 | or0, p3 | or1)
        return pairs, four(one, one, one, one), four(even, odd, even, odd)


@triton.jit
def _int2(words, or0, or1, or2, DTYPE: tl.constexpr):
    one = _one(words, DTYPE)
    if DTYPE == tl.bfloat16:
        top = words >> 8
        pairs = eight(
            words & 0x00030003, words & 0x000C000C, words & 0x00300030, words & 0x00C000C0,
            top & 0x00030003, top & 0x000C000C, top & 0x00300030, top & 0x00C000C0,
        )  # fmt: skip
        f0, f1 = _like(words, 0x7F00), _like(words, 0x7E00)  # 2**127, 2**125
        f2, f3 = _like(words, 0x7D00), _like(words, 0x7C00)  # 2**123, 2**121
        two = _like(words, 0xBD00)  # -2 * 2**-6
        return pairs, eight(f0, f1, f2, f3, f0, f1, f2, f3), eight(two, two, two, two, two, two, two, two)
    else:
        middle = words >> 6
        top = words >> 12
        pairs = eight(
            (words & 0x00030003) | or0, (words & 0x000C000C) | or1, (words & 0x00300030) | or2,
            (middle & 0x00030003) | or0, (middle & 0x000C000C) | or1, (middle & 0x00300030) | or2,
            (top & 0x00030003) | or0, (top & 0x000C000C) | or1,
        )  # fmt: skip
        # -(1024 + 2), -(256 + 2) and -(64 + 2)
        o0, o1, o2 = _like(words, 0xE402), _like(words, 0xDC08), _like(words, 0xD420)
        return pairs, eight(one, one, one, one, one, one, one, one), eight(o0, o1, o2, o0, o1, o2, o0, o1)


@triton.jit
def _int3(words, bits, or0, or1, or2, DTYPE: tl.constexpr):
    middle = words >> 6
    top = words >> 12
    high = bits | (bits << 8)  # bits 0 to 7 of both halves
    odd = high >> 1
    p0 = (high & 0x00040004) ^ ((words & 0x00030003) | or0)
    p1 = (high & 0x00100010) ^ ((words & 0x000C000C) | or1)
    p2 = (high & 0x00400040) ^ ((words & 0x00300030) | or2)
    p3 = (odd & 0x00040004) ^ ((middle & 0x00030003) | or0)
    p4 = (odd & 0x00100010) ^ ((middle & 0x000C000C) | or1)
    p5 = (odd & 0x00400040) ^ ((middle & 0x00300030) | or2)
    p6 = ((high << 2) & 0x00040004) ^ ((top & 0x00030003) | or0)
    p7 = ((high << 3) & 0x00100010) ^ ((top & 0x000C000C) | or1)
    one = _one(words, DTYPE)
    # -(128 + 4), -(32 + 4) and -(8 + 4); eight times the power of two in float16
    o0 = _like(words, 0xC304 if DTYPE == tl.bfloat16 else 0xE404)
    o1 = _like(words, 0xC210 if DTYPE == tl.bfloat16 else 0xDC10)
    o2 = _like(words, 0xC140 if DTYPE == tl.bfloat16 else 0xD440)
    pairs, offsets = eight(p0, p1, p2, p3, p4, p5, p6, p7), eight(o0, o1, o2, o0, o1, o2, o0, o1)
    return pairs, eight(one, one, one, one, one, one, one, one), offsets


@triton.jit
def _int8(words, or0, DTYPE: tl.constexpr):
    even, odd = words & 0x00FF00FF, (words >> 8) & 0x00FF00FF
    if DTYPE == tl.bfloat16:
        factor, offset = _like(words, 0x7F00), _like(words, 0xC000)  # 2**127, -128 * 2**-6
        return tl.join(even, odd), tl.join(factor, factor), tl.join(offset, offset)
    else:
        one, offset = _one(words, DTYPE), _like(words, 0xE480)  # 1, -(1024 + 128)
        return tl.join(even | or0, odd | or0), tl.join(one, one), tl.join(offset, offset)


@triton.jit
def _float4(
    words, or0, or1, m0: tl.constexpr, m1: tl.constexpr, m2: tl.constexpr, m3: tl.constexpr, s0: tl.constexpr,
    s1: tl.constexpr, s2: tl.constexpr, s3: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    p0 = _small_float(words, or0, or1, m0 - LOWEST, s0 - 15)
    p1 = _small_float(words, or0, or1, m1 - LOWEST, s1 - 15)
    p2 = _small_float(words, or0, or1, m2 - LOWEST, s2 - 15)
    p3 = _small_float(words, or0, or1, m3 - LOWEST, s3 - 15)
    return four(p0, p1, p2, p3)


@triton.jit
def _small_float(words, magnitudes, signs, magnitude: tl.constexpr, sign: tl.constexpr):
    """Shift magnitude and sign right by so many bits, to where a float has them; the masks are arguments."""
    moved = _shift(words, magnitude)
    if magnitude == sign:
        return moved & (magnitudes | signs)
    else:
        return (_shift(words, sign) & signs) | (moved & magnitudes)


@triton.jit
def _shift(words, right: tl.constexpr):
    if right == 0:
        return words
    elif right > 0:
        return words >> right
    else:
        return words << -right
