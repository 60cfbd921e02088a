# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: SIM300 - names of compile-time arguments are capitals
"""Turning packed words into 16-bit floating-point weights inside a kernel, with as few instructions as it takes.

A word holds pairs of weights that are neighbours along K, one in each 16-bit half, so that a mask of the word is the
register the matrix unit reads (`layout.py` defines the bits). Integers are put under a constant exponent: with a code
at mantissa bit `p` the half reads `2**(M - p) + code`, M mantissa bits, and one subtraction, exact in the same dtype,
leaves the code. Small floats are moved under the exponent field of the target; what that does to their value is a power
of two, which the multiplication by the scale takes back.

The constants OR-ed in (`or0` to `or2`) are kernel arguments, not literals: a three-input logic instruction takes one
literal, and with two the assembler spends a second instruction on every pair.

Table indices are looked up by byte permutations: the eight entries' low bytes are two registers, their high bytes two
more, and one instruction finds a byte for each of four codes.

Triton's interpreter cannot compute in bfloat16. There (`INTERPRET`) the same bits are widened to float32, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(
    words, bits, or0, or1, or2, table, zero, scale,
    GRID: tl.constexpr, HAS_ZERO: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the weights of every word, `[rows, words, codes per word / 2, 2]` in `DTYPE`: K order when flattened.

    Unscaled integers come out as code less zero code, plus `zero`. Unscaled small floats come out times `2**-15` in
    float16 and `2**-127` in bfloat16, those of `e2m1` as one of 0, 1, 2, 3, 4, 6, 8, 12. Table entries are as
    `layout.table_words` rounds and scales them.

    Args:
        words: uint32 `[rows, words]`.
        bits: The high bits of 3-bit codes, 16 for every word, uint32 `[rows, words]`; unused for other grids.
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
        pairs, offsets = _int4(words, or0, or1, DTYPE)
    elif GRID == "int2":
        pairs, offsets = _int2(words, or0, or1, or2, DTYPE)
    elif GRID == "int3":
        pairs, offsets = _int3(words, bits, or0, or1, or2, DTYPE)
    elif GRID == "int8":
        pairs, offsets = _int8(words, or0, or1, DTYPE)
    elif GRID == "e2m1":
        pairs = _float4(words, or0, or1, 0, 3, 6, 9, 13, 12, 15, 14, 6 if DTYPE == tl.bfloat16 else 9)
        offsets = pairs
    elif GRID == "table8" or GRID == "table16":
        pairs = _looked_up(words, table, GRID == "table16", INTERPRET)
        offsets = pairs
    else:
        tl.static_assert(GRID == "e3m0", "unknown grid")
        pairs = _float4(words, or0, or1, 0, 3, 7, 12, 6, 11, 15, 10, 7 if DTYPE == tl.bfloat16 else 10)
        offsets = pairs
    INTEGER: tl.constexpr = GRID == "int2" or GRID == "int3" or GRID == "int4" or GRID == "int8"
    SHAPE: tl.constexpr = (words.shape[0], words.shape[1], pairs.numel // words.numel)
    pairs = pairs.reshape(SHAPE)
    offsets = offsets.reshape(SHAPE)
    if INTERPRET:
        values = _halves(pairs, DTYPE, INTERPRET)
        if INTEGER:
            values += _halves(offsets, DTYPE, INTERPRET)
        if HAS_ZERO:
            values += _halves(zero, DTYPE, INTERPRET)[:, :, None, :]
        if SCALED:
            values *= _halves(scale, DTYPE, INTERPRET)[:, :, None, :]
        return values
    else:
        ONE: tl.constexpr = 0x3F803F80 if DTYPE == tl.bfloat16 else 0x3C003C00
        if INTEGER:
            pairs = _fma(pairs, tl.full((), ONE, tl.uint32), offsets, DTYPE)
        if HAS_ZERO:
            pairs = _fma(pairs, tl.full((), ONE, tl.uint32), zero[:, :, None], DTYPE)
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
def _four(a0, a1, a2, a3):
    """Stack into `[..., 2, 2]`, in order."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def _eight(a0, a1, a2, a3, a4, a5, a6, a7):
    """Stack into `[..., 2, 2, 2]`, in order."""
    return tl.join(_four(a0, a2, a4, a6), _four(a1, a3, a5, a7))


@triton.jit
def _like(words, value: tl.constexpr):
    """Fill a tensor of the shape of `words` with the bits of `value` in both halves."""
    return tl.full(words.shape, value * 0x10001, tl.uint32)


@triton.jit
def _int4(words, or0, or1, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        p0 = (words & 0x000F000F) | or0
        p1 = ((words >> 4) & 0x000F000F) | or0
        p2 = ((words >> 8) & 0x000F000F) | or0
        p3 = ((words >> 12) & 0x000F000F) | or0
        eight = _like(words, 0xC308)  # -(128 + 8)
        return _four(p0, p1, p2, p3), _four(eight, eight, eight, eight)
    else:  # ten mantissa bits take a code at bit 4 as well, which saves half of the shifts
        top = words >> 8
        p0 = (words & 0x000F000F) | or0
        p1 = (words & 0x00F000F0) | or1
        p2 = (top & 0x000F000F) | or0
        p3 = (top & 0x00F000F0) | or1
        even, odd = _like(words, 0xE408), _like(words, 0xD480)  # -(1024 + 8), -(64 + 8)
        return _four(p0, p1, p2, p3), _four(even, odd, even, odd)


@triton.jit
def _int2(words, or0, or1, or2, DTYPE: tl.constexpr):
    middle = words >> 6
    top = words >> 12
    p0 = (words & 0x00030003) | or0
    p1 = (words & 0x000C000C) | or1
    p2 = (words & 0x00300030) | or2
    p3 = (middle & 0x00030003) | or0
    p4 = (middle & 0x000C000C) | or1
    p5 = (middle & 0x00300030) | or2
    p6 = (top & 0x00030003) | or0
    p7 = (top & 0x000C000C) | or1
    # -(128 + 2), -(32 + 2) and -(8 + 2); eight times the power of two in float16
    o0 = _like(words, 0xC302 if DTYPE == tl.bfloat16 else 0xE402)
    o1 = _like(words, 0xC208 if DTYPE == tl.bfloat16 else 0xDC08)
    o2 = _like(words, 0xC120 if DTYPE == tl.bfloat16 else 0xD420)
    return _eight(p0, p1, p2, p3, p4, p5, p6, p7), _eight(o0, o1, o2, o0, o1, o2, o0, o1)


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
    # -(128 + 4), -(32 + 4) and -(8 + 4); eight times the power of two in float16
    o0 = _like(words, 0xC304 if DTYPE == tl.bfloat16 else 0xE404)
    o1 = _like(words, 0xC210 if DTYPE == tl.bfloat16 else 0xDC10)
    o2 = _like(words, 0xC140 if DTYPE == tl.bfloat16 else 0xD440)
    return _eight(p0, p1, p2, p3, p4, p5, p6, p7), _eight(o0, o1, o2, o0, o1, o2, o0, o1)


@triton.jit
def _int8(words, or0, or1, DTYPE: tl.constexpr):
    high = words >> 8
    if DTYPE == tl.bfloat16:
        # Seven mantissa bits: 128 + (code % 128), less 128 if the top bit is set and 256 if it is not.
        pairs = tl.join((words & 0x007F007F) | or0, (high & 0x007F007F) | or0)
        return pairs, tl.join((words & 0x00800080) ^ or1, (high & 0x00800080) ^ or1)
    else:
        offset = _like(words, 0xE480)  # -(1024 + 128)
        return tl.join((words & 0x00FF00FF) | or0, (high & 0x00FF00FF) | or0), tl.join(offset, offset)


@triton.jit
def load_table(ptr, GRID: tl.constexpr, DTYPE: tl.constexpr):
    """Return the bytes of a table's entries, eight registers, and what sums are to be multiplied by.

    Args:
        ptr: int32 `[3, 16]`, see `layout.table_words`.
        GRID: See `decode`; anything but a table is not read.
        DTYPE: See `decode`.
    """
    if GRID == "table8" or GRID == "table16":
        ptr += 32 if DTYPE == tl.bfloat16 else 16
        a0, a1, a2, a3 = _word(ptr), _word(ptr + 1), _word(ptr + 2), _word(ptr + 3)
        factor = tl.load(ptr + 8).to(tl.float32, bitcast=True)
        if GRID == "table8":
            return (a0, a1, a2, a3, a0, a1, a2, a3), factor
        else:
            return (a0, a1, a2, a3, _word(ptr + 4), _word(ptr + 5), _word(ptr + 6), _word(ptr + 7)), factor
    else:
        none = tl.full((), 0, tl.uint32)
        return (none, none, none, none, none, none, none, none), tl.full((), 1.0, tl.float32)


@triton.jit
def _word(ptr):
    return tl.load(ptr).to(tl.uint32, bitcast=True)


@triton.jit
def _looked_up(words, table, SIXTEEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Look all codes of every word up: a byte permutation finds four codes' low or high bytes among eight entries."""
    index = words & 0x77777777
    p0, p1 = _look_up_four(index, words, table, SIXTEEN, INTERPRET)
    p2, p3 = _look_up_four(index >> 16, words << 4, table, SIXTEEN, INTERPRET)
    return _four(p0, p1, p2, p3)


@triton.jit
def _look_up_four(index, tops, table, SIXTEEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Return two pairs of entries: indices modulo 8 are the low four nibbles, their fourth bits the tops of bytes."""
    low = permute(table[0], table[1], index, INTERPRET)
    high = permute(table[2], table[3], index, INTERPRET)
    if SIXTEEN:
        second = permute(tops, tops, tl.full((), 0xBA98, tl.uint32), INTERPRET)  # bytes of ones where the bit is set
        low = low ^ ((low ^ permute(table[4], table[5], index, INTERPRET)) & second)
        high = high ^ ((high ^ permute(table[6], table[7], index, INTERPRET)) & second)
    else:
        high = high ^ (tops & 0x80808080)
    first_pair = permute(low, high, tl.full((), 0x5140, tl.uint32), INTERPRET)
    return first_pair, permute(low, high, tl.full((), 0x7362, tl.uint32), INTERPRET)


@triton.jit
def permute(a, b, selector, INTERPRET: tl.constexpr):
    """Choose four of the eight bytes of `a` and `b` by the low four nibbles of a selector; 8 more: its sign, spread."""
    if INTERPRET:
        out = (a ^ a) ^ (selector ^ selector)
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (tl.where((nibble & 4) != 0, b, a) >> ((nibble & 3) * 8)) & 0xFF
            byte = tl.where((nibble & 8) != 0, (byte >> 7) * 0xFF, byte)
            out = out | (byte << (8 * i))
        return out
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.uint32, True, 1)


@triton.jit
def table_codes(words):
    """Return the table indices of every word, uint32 `[rows, words, 4, 2]`: K order when flattened."""
    codes = _eight(
        _table_code(words, 0), _table_code(words, 1), _table_code(words, 2), _table_code(words, 3),
        _table_code(words, 4), _table_code(words, 5), _table_code(words, 6), _table_code(words, 7),
    )  # fmt: skip
    return codes.reshape(words.shape[0], words.shape[1], 4, 2)


@triton.jit
def _table_code(words, j: tl.constexpr):
    TOP: tl.constexpr = 8 * (j % 4) + (7 if j < 4 else 3)
    return ((words >> (4 * j)) & 7) | (((words >> TOP) & 1) << 3)


@triton.jit
def _float4(
    words, or0, or1, m0: tl.constexpr, m1: tl.constexpr, m2: tl.constexpr, m3: tl.constexpr, s0: tl.constexpr,
    s1: tl.constexpr, s2: tl.constexpr, s3: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    p0 = _small_float(words, or0, or1, m0 - LOWEST, s0 - 15)
    p1 = _small_float(words, or0, or1, m1 - LOWEST, s1 - 15)
    p2 = _small_float(words, or0, or1, m2 - LOWEST, s2 - 15)
    p3 = _small_float(words, or0, or1, m3 - LOWEST, s3 - 15)
    return _four(p0, p1, p2, p3)


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
