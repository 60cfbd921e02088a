# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: SIM300 - names of compile-time arguments are capitals
"""Byte permutations in kernels: indices looked up in tables that lie in registers, kept columns put in their place.

A table's eight entries are four registers, two with their low bytes and two with their high bytes; one instruction
finds a byte for each of four indices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_table(ptr, n, GRID: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return the bytes of a table's entries, eight registers, and what sums are to be multiplied by.

    Args:
        ptr: int32 `[3, 16]`, see `layout.table_words`.
        n: Any number that is not negative.
        GRID: See `decode`; anything but a table is not read.
        DTYPE: See `decode`.
        INTERPRET: See `decode`.
    """
    if GRID == "table2bit" or GRID == "table3bit" or GRID == "table8" or GRID == "table16":
        ptr += 32 if DTYPE == tl.bfloat16 else 16
        a0, a1, a2, a3 = _words(ptr, n, INTERPRET)
        factor = tl.load(ptr + 8).to(tl.float32, bitcast=True)
        if GRID == "table16":
            a4, a5, a6, a7 = _words(ptr + 4, n, INTERPRET)
            return (a0, a1, a2, a3, a4, a5, a6, a7), factor
        else:
            return (a0, a1, a2, a3, a0, a1, a2, a3), factor
    else:
        none = tl.full((), 0, tl.uint32)
        return (none, none, none, none, none, none, none, none), tl.full((), 1.0, tl.float32)


@triton.jit
def _words(ptr, n, INTERPRET: tl.constexpr):
    return (
        _word(ptr, n, INTERPRET),
        _word(ptr + 1, n, INTERPRET),
        _word(ptr + 2, n, INTERPRET),
        _word(ptr + 3, n, INTERPRET),
    )


@triton.jit
def _word(ptr, n, INTERPRET: tl.constexpr):
    word = tl.load(ptr).to(tl.uint32, bitcast=True)
    if INTERPRET:
        return word
    else:
        # The assembler keeps what all threads share in registers of its own kind, which a byte permutation does not
        # read: it would move a word for every use. So every thread adds a zero that it makes from its number.
        own: tl.constexpr = "{ .reg .s32 t; mov.u32 t, %tid.x; add.s32 t, t, $2; shr.s32 t, t, 31; or.b32 $0, t, $1; }"
        return tl.inline_asm_elementwise(own, "=r,r,r", [word, n], tl.uint32, True, 1)


@triton.jit
def look_up2(words, table, INTERPRET: tl.constexpr):
    """Look all codes of every word up in a table of four entries: indices are halves of nibbles."""
    first = words & 0x33333333
    second = (words >> 2) & 0x33333333
    p0, p1 = _found_four(first, table, INTERPRET)
    p2, p3 = _found_four(first >> 16, table, INTERPRET)
    p4, p5 = _found_four(second, table, INTERPRET)
    p6, p7 = _found_four(second >> 16, table, INTERPRET)
    return eight(p0, p1, p2, p3, p4, p5, p6, p7)


@triton.jit
def look_up3(words, bits, table, INTERPRET: tl.constexpr):
    """Look all codes of every word up in a table of eight: the top bits of twelve nibbles are four indices more."""
    index = words & 0x77777777
    p0, p1 = _found_four(index, table, INTERPRET)
    p2, p3 = _found_four(index >> 16, table, INTERPRET)
    p4, p5 = _found_four(bits & 0x7777, table, INTERPRET)
    rest = ((words >> 3) & 0x1111) | ((words >> 18) & 0x2222) | ((bits >> 1) & 0x4444)
    p6, p7 = _found_four(rest, table, INTERPRET)
    return eight(p0, p1, p2, p3, p4, p5, p6, p7)


@triton.jit
def _found_four(index, table, INTERPRET: tl.constexpr):
    """Return two pairs of entries; indices, less than eight, are the low four nibbles."""
    low = permute(table[0], table[1], index, INTERPRET)
    high = permute(table[2], table[3], index, INTERPRET)
    first_pair = permute(low, high, tl.full((), 0x5140, tl.uint32), INTERPRET)
    return first_pair, permute(low, high, tl.full((), 0x7362, tl.uint32), INTERPRET)


@triton.jit
def look_up(words, table, SIXTEEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Look all codes of every word up: a byte permutation finds four codes' low or high bytes among eight entries."""
    index = words & 0x77777777
    p0, p1 = _look_up_four(index, words, table, SIXTEEN, INTERPRET)
    p2, p3 = _look_up_four(index >> 16, words << 4, table, SIXTEEN, INTERPRET)
    return four(p0, p1, p2, p3)


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
def spread(words, bits, INTERPRET: tl.constexpr):
    """Put the two halves of every word where its pattern says among four, the others being zero.

    A pattern is looked up as four bytes, one for each column: the two nibbles that choose the bytes of the first half,
    of the second, or of a zero. Two columns' bytes are the selector that makes their pair.
    """
    even, odd = words.reshape(words.shape[0], words.shape[1] // 4, 2, 2).split()
    w0, w2 = even.split()
    w1, w3 = odd.split()
    c0 = permute(_bits(0x44101010), _bits(0x44444444), bits, INTERPRET)  # of the four words
    c1 = permute(_bits(0x10444432), _bits(0x44444410), bits, INTERPRET)
    c2 = permute(_bits(0x32443244), _bits(0x44441044), bits, INTERPRET)
    c3 = permute(_bits(0x44324444), _bits(0x44443232), bits, INTERPRET)
    left01, left23 = permute(c0, c1, _bits(0x5140), INTERPRET), permute(c0, c1, _bits(0x7362), INTERPRET)
    right01, right23 = permute(c2, c3, _bits(0x5140), INTERPRET), permute(c2, c3, _bits(0x7362), INTERPRET)
    zero = _bits(0)
    return eight(
        permute(w0, zero, left01, INTERPRET), permute(w0, zero, right01, INTERPRET),
        permute(w1, zero, left01 >> 16, INTERPRET), permute(w1, zero, right01 >> 16, INTERPRET),
        permute(w2, zero, left23, INTERPRET), permute(w2, zero, right23, INTERPRET),
        permute(w3, zero, left23 >> 16, INTERPRET), permute(w3, zero, right23 >> 16, INTERPRET),
    )  # fmt: skip


@triton.jit
def _bits(value: tl.constexpr):
    return tl.full((), value, tl.uint32)


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
def table_codes(words, bits, GRID: tl.constexpr):
    """Return the table indices of every word, uint32 `[rows, words, codes per word / 2, 2]`: K order when flattened."""
    first = _eight_codes(words, bits, 0, GRID)
    if GRID == "table8" or GRID == "table16":
        return first.reshape(words.shape[0], words.shape[1], 4, 2)
    else:
        second = _eight_codes(words, bits, 8, GRID)
        both = tl.join(first, second).permute(0, 1, 5, 2, 3, 4)
        return both.reshape(words.shape[0], words.shape[1], 8, 2)


@triton.jit
def _eight_codes(words, bits, j: tl.constexpr, GRID: tl.constexpr):
    return eight(
        _table_code(words, bits, j, GRID), _table_code(words, bits, j + 1, GRID),
        _table_code(words, bits, j + 2, GRID), _table_code(words, bits, j + 3, GRID),
        _table_code(words, bits, j + 4, GRID), _table_code(words, bits, j + 5, GRID),
        _table_code(words, bits, j + 6, GRID), _table_code(words, bits, j + 7, GRID),
    )  # fmt: skip


@triton.jit
def _table_code(words, bits, j: tl.constexpr, GRID: tl.constexpr):
    PLACE: tl.constexpr = 4 * (j % 4)
    if GRID == "table2bit":
        return (words >> (4 * (j % 8) + 2 * (j // 8))) & 3
    elif GRID != "table3bit":
        return ((words >> (4 * j)) & 7) | (((words >> (8 * (j % 4) + (7 if j < 4 else 3))) & 1) << 3)
    elif j < 8:
        return (words >> (4 * j)) & 7
    elif j < 12:
        return (bits >> PLACE) & 7
    else:
        low = ((words >> (PLACE + 3)) & 1) | (((words >> (PLACE + 19)) & 1) << 1)
        return low | (((bits >> (PLACE + 3)) & 1) << 2)


@triton.jit
def four(a0, a1, a2, a3):
    """Stack into `[..., 2, 2]`, in order."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def eight(a0, a1, a2, a3, a4, a5, a6, a7):
    """Stack into `[..., 2, 2, 2]`, in order."""
    return tl.join(four(a0, a2, a4, a6), four(a1, a3, a5, a7))
