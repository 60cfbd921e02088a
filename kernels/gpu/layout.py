"""The layout in memory that the kernels read, made once from a format's codes and never saved.

Codes become 32-bit words of one row; a word's codes are neighbours along K, and every pair of neighbours lies at the
same place of both 16-bit halves (`code_bits` is the definition). Rows and columns are padded, so weights are read
without masks. Scales of 128 columns lie together, N contiguous around them.

Everything commutes with slicing rows, and columns in multiples of 128 and of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

CODES = {
    "int2": 16,
    "int3": 16,
    "int4": 8,
    "int8": 4,
    "e2m1": 8,
    "e3m0": 8,
    "table2bit": 16,
    "table3bit": 16,
    "table8": 8,
    "table16": 8,
    "float16-2of4": 4,
    "bfloat16-2of4": 4,
}
"""Columns in a word, by grid."""

SPARSE = {"float16-2of4": torch.float16, "bfloat16-2of4": torch.bfloat16}
"""Grids of 16-bit floats of which at least two of every four columns are zero; see `sparse.py`."""

TABLES = ("table2bit", "table3bit", "table8", "table16")
"""Grids whose codes index a table: of four values, of eight, of eight with a sign in the code, and of sixteen."""

THREE_BITS = ("int3", "table3bit")
"""Grids with 16 more bits for every word, in `RuntimeWeight.bits`."""

TABLE_WORDS = 16
"""Words of one row of `RuntimeWeight.table`."""

PAD_ROWS, PAD_COLUMNS = 64, 128
SPARSE_COLUMNS = 256
"""What `SPARSE` weights are padded to: steps are long enough that two threads share the `bits` of a row."""

CHUNK = 128
"""Columns whose scales lie together."""

_ROWS_AT_ONCE = 4096
_FLOAT_BITS = {"e2m1": ((0, 3, 6, 9), (13, 12, 15, 14)), "e3m0": ((0, 3, 7, 12), (6, 11, 15, 10))}
"""Lowest magnitude bit and sign bit of the four pairs: what costs the fewest instructions to unpack for both dtypes."""

_TABLE_FORMATS = ("power2", "power3", "power4", "codebook2", "codebook3", "codebook4")

_HIGH_BITS = (2, 4, 6, 3, 5, 7, 0, 1)
"""Where the third bit of the eight pairs of an int3 word lies in its byte."""


@dataclass(frozen=True)
class RuntimeWeight:
    """A weight `[n, k]` as the kernels read it.

    Attributes:
        grid: A key of `CODES`.
        shape: `(n, k)` without padding.
        group: Columns per scale; 0 if whole rows share one.
        scale_kind: `float`, `e4m3`, `e8m0`, or `none` if `group` is 0.
        row_kind: `none`, `times` or `over`: what `row` is for.
        words: int32 `[rows, columns / codes per word]`, padded.
        bits: int16 of the same shape: 16 more bits for every word of `THREE_BITS`; for every four words of `SPARSE`;
            else empty.
        scale: `[chunks, rows, groups per chunk]`: floats, E4M3 bytes, or E8M0 bytes moved so that a row's largest is
            254; empty if `group` is 0.
        zero: float16 of the shape of `scale` (`[1, rows, 1]` if `group` is 0): zero code less zero point; empty for
            symmetric weights.
        row: float32 `[rows]`: the row's scale (`times`), its power of two taken out of E8M0 bytes (`times`), or the
            matrix's divisor (`over`); else empty.
        table: int32 `[3, 16]` of `TABLES`, see `table_words`; else empty.
    """

    grid: str
    shape: tuple[int, int]
    group: int
    scale_kind: str
    row_kind: str
    words: Tensor
    bits: Tensor
    scale: Tensor
    zero: Tensor
    row: Tensor
    table: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors, in the order of the attributes."""
        return (self.words, self.bits, self.scale, self.zero, self.row, self.table)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> RuntimeWeight:
        """Return the same weight on another device."""
        return self._with(*(tensor.to(device) for tensor in self.tensors))

    def clone(self) -> RuntimeWeight:
        """Return a copy with memory of its own."""
        return self._with(*(tensor.clone() for tensor in self.tensors))

    def _with(
        self, words: Tensor, bits: Tensor, scale: Tensor, zero: Tensor, row: Tensor, table: Tensor
    ) -> RuntimeWeight:
        return replace(self, words=words, bits=bits, scale=scale, zero=zero, row=row, table=table)


def pad_columns(grid: str) -> int:
    """Return what the columns of a grid are padded to a multiple of."""
    return SPARSE_COLUMNS if grid in SPARSE else PAD_COLUMNS


def groups_per_chunk(group: int) -> int:
    """Return how many groups' scales of one row lie next to each other."""
    return CHUNK // group if 0 < group < CHUNK and CHUNK % group == 0 else 1


def refuse(name: str, k: int, group: int) -> str | None:
    """Return why weights of this format have no runtime layout, or None.

    Args:
        name: The format's name.
        k: Columns of the weight.
        group: Columns per scale; 0, or as many as there are, for whole rows; more for one scale in all.
    """
    if name in ("nvfp4", "mxfp4", "fp4"):
        return None
    grid = name.removesuffix("-asym")
    if grid not in CODES and name not in _TABLE_FORMATS:
        return f"no kernel unpacks {name}"
    if 0 < group < k and group % 16:
        return f"its groups of {group} inputs are no multiple of 16"
    return None


def code_bits(grid: str) -> tuple[tuple[int, ...], ...]:
    """Return, for each code of a word, where its bits lie, the lowest first; at 32 and up: in `bits`.

    Codes `2 * i` and `2 * i + 1` lie 16 bits apart. Table indices lie in nibbles, in order, where a byte permutation
    reads them. Those of 2 bits fill the lower halves of nibbles first, then the upper ones. Of 3 bits, the top bits of
    nibbles make up the last four indices: one bit each from the first, second and third four nibbles. Of 4 bits, the
    fourth bits of the first four codes are the top bits of bytes, those of the others lie four places below.
    """
    if grid == "table2bit":
        return tuple((4 * (code % 8) + 2 * (code // 8), 4 * (code % 8) + 2 * (code // 8) + 1) for code in range(16))
    if grid == "table3bit":
        plain = [(4 * code, 4 * code + 1, 4 * code + 2) for code in range(12)]
        return (*plain, *((4 * code + 3, 4 * code + 19, 4 * code + 35) for code in range(4)))
    places: list[tuple[int, ...]] = []
    for code in range(CODES[grid]):
        if grid in TABLES:
            places.append((4 * code, 4 * code + 1, 4 * code + 2, 8 * (code % 4) + (7 if code < 4 else 3)))
            continue
        pair, half = divmod(code, 2)
        if grid in _FLOAT_BITS:
            magnitude, sign = (bits[pair] for bits in _FLOAT_BITS[grid])
            inside: tuple[int, ...] = (magnitude, magnitude + 1, magnitude + 2, sign)
        else:
            width = 2 if grid == "int3" else int(grid.removeprefix("int"))
            inside = tuple(range(width * pair, width * (pair + 1)))
        third = (32 + _HIGH_BITS[pair] + 8 * half,) if grid == "int3" else ()
        places.append((*(bit + 16 * half for bit in inside), *third))
    return tuple(places)


@lru_cache(maxsize=32)
def constants(grid: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return what the kernels OR into (integers) or mask with (floats) both halves of a word.

    A code at mantissa bit `p` stands for itself under the exponent of `2**(M - p)`. What needs none gets zeros.
    """
    mantissa, bias = (7, 127) if dtype == torch.bfloat16 else (10, 15)

    def exponent(power: int) -> int:
        return (bias + power << mantissa) * 0x10001

    if grid in TABLES or grid in SPARSE or (dtype == torch.bfloat16 and grid in ("int2", "int4", "int8")):
        return 0, 0, 0
    if grid in _FLOAT_BITS:
        lowest = mantissa - (1 if grid == "e2m1" else 0)
        # As int32: kernel arguments are signed.
        return (7 << lowest) * 0x10001, 0x80008000 - (1 << 32), 0
    if grid == "int4":
        return exponent(mantissa), exponent(mantissa - 4), 0
    if grid == "int8":
        return exponent(mantissa), 0, 0
    return exponent(mantissa), exponent(mantissa - 2), exponent(mantissa - 4)


def table_words(values: Tensor, exponent: Tensor | None = None) -> Tensor:
    """Return a table as the kernels read it, int32 `[3, 16]`, on the device of `values`.

    Row 0 is the table itself, float32; tables of 2 and 3 bits fill its beginning. Row 1 is for float16 and row 2 for
    bfloat16: entries, rounded to that dtype, as the low bytes of entries 0 to 3 and 4 to 7, their high bytes, then the
    same of entries 8 to 15; and word 8 is the float32 by which sums must be multiplied, a power of two: entries are
    scaled so that the largest is in `[2^14, 2^15)`, where float16 has the most room below. Word 9 of row 1 is not for
    kernels.

    Args:
        values: float32 `[16]`, finite.
        exponent: float32 `[1]`: what a table of powers was made from; `table_exponent` gives it back.
    """
    _, top = torch.frexp(values.abs().amax())
    unit = torch.ldexp(torch.ones_like(values[0]), top - 15)
    rows = [values.float().view(torch.int32)]
    for dtype in (torch.float16, torch.bfloat16):
        bits = (values / unit).to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF
        quads = torch.stack((bits & 0xFF, bits >> 8)).unflatten(1, (2, 2, 4))  # [byte, half, register, entry]
        shifts = torch.tensor([0, 8, 16, 24], device=values.device)
        registers = (quads << shifts).sum(-1).transpose(0, 1).flatten()  # low and high bytes of the first eight, ...
        last = unit.view(1).view(torch.int32).to(torch.int64)
        rows.append(_signed(functional.pad(torch.cat((registers, last)), (0, 7)) & 0xFFFFFFFF, 32).to(torch.int32))
    if exponent is not None:
        rows[1][9] = exponent.float().view(torch.int32)[0]
    return torch.stack(rows)


def table_values(table: Tensor) -> Tensor:
    """Return the float32 `[16]` that `table_words` was given."""
    return table[0].view(torch.float32)


def table_exponent(table: Tensor) -> Tensor:
    """Return the float32 `[1]` exponent that `table_words` was given."""
    return table[1, 9:10].clone().view(torch.float32)


def is_signed(values: Tensor) -> bool:
    """Return whether the second half of a table `[16]` is the first, negated: what `table8` can hold."""
    return torch.equal(values[8:], -values[:8])


def pack_words(codes: Tensor, grid: str) -> tuple[Tensor, Tensor]:
    """Pack uint8 codes `[n, k]` into int32 words and, for 3 bits, 16 more each as int16; both padded with code 0."""
    rows, columns = (-(-size // pad) * pad for size, pad in zip(codes.shape, (PAD_ROWS, PAD_COLUMNS), strict=True))
    words = codes.new_zeros((rows, columns // CODES[grid]), dtype=torch.int32)
    bits = codes.new_zeros(words.shape if grid in THREE_BITS else (0,), dtype=torch.int16)
    places = code_bits(grid)
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):  # a copy of wide integers only of some rows
        part = codes[start : start + _ROWS_AT_ONCE]
        lanes = functional.pad(part, (0, columns - codes.shape[1])).unflatten(1, (-1, CODES[grid])).to(torch.int64)
        stream = torch.zeros_like(lanes[..., 0])  # [rows, words]
        for lane, where in enumerate(places):
            for bit, place, width in _runs(where):
                stream |= (lanes[..., lane] >> bit & (1 << width) - 1) << place
        words[start : start + len(part)] = _signed(stream & 0xFFFFFFFF, 32).to(torch.int32)
        if grid in THREE_BITS:
            bits[start : start + len(part)] = _signed(stream >> 32, 16).to(torch.int16)
    return words, bits


def unpack_words(words: Tensor, bits: Tensor, grid: str, shape: tuple[int, int]) -> Tensor:
    """Return the uint8 codes `[n, k]` of packed words; the inverse of `pack_words`."""
    n, k = shape
    codes = words.new_empty(n, words.shape[1], CODES[grid], dtype=torch.uint8)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, n))
        stream = words[rows].to(torch.int64) & 0xFFFFFFFF
        if grid in THREE_BITS:
            stream |= (bits[rows].to(torch.int64) & 0xFFFF) << 32
        for lane, where in enumerate(code_bits(grid)):
            parts = [(stream >> place & (1 << width) - 1) << bit for bit, place, width in _runs(where)]
            codes[rows, :, lane] = torch.stack(parts).sum(0).to(torch.uint8)
    return codes.flatten(1)[:, :k].contiguous()


def chunked(groups: Tensor, group: int) -> Tensor:
    """Return `[n, groups]` as the kernels read it, `[chunks, rows, groups per chunk]`, padded with zeros."""
    per = groups_per_chunk(group)
    padded = functional.pad(groups, (0, -groups.shape[1] % per, 0, -groups.shape[0] % PAD_ROWS))
    chunks: Tensor = padded.unflatten(1, (-1, per)).transpose(0, 1).contiguous()
    return chunks


def unchunked(chunks: Tensor, n: int, n_groups: int) -> Tensor:
    """Return the `[n, n_groups]` that `chunked` was given."""
    groups: Tensor = chunks.transpose(0, 1).flatten(1)[:n, :n_groups].contiguous()
    return groups


def _runs(where: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return a code's bits as runs that lie together: the first bit, its place, and how many there are."""
    starts = [bit for bit in range(len(where)) if bit == 0 or where[bit] != where[bit - 1] + 1]
    return [(bit, where[bit], stop - bit) for bit, stop in pairwise((*starts, len(where)))]


def _signed(stream: Tensor, width: int) -> Tensor:
    """Read unsigned numbers of `width` bits as two's complement."""
    return torch.where(stream >> (width - 1) == 1, stream - (1 << width), stream)
