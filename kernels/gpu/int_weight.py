"""Integer weights as the integer kernels read them: bytes in two's complement, made once and never saved.

LLM-FP4's 4-bit floats are whole numbers times a scale, too: E1M2 of up to 7, which 4 bits hold, E2M1 of up to 12 and
E3M0 of up to 64, which take 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.base import PackedTensor, QParams, QuantFormat, n_groups
from compressor.formats.codebook import nearest
from compressor.formats.float4 import Float4
from compressor.formats.ints import IntFormat
from compressor.kernels.gpu.layout import PAD_COLUMNS, PAD_ROWS

HALF = PAD_COLUMNS // 2
"""Columns whose 4-bit codes lie in the low nibbles of as many bytes; those of the next ones lie in the high nibbles."""

MAX_COLUMNS = 1 << 16
"""So that int32 holds a sum of products, and what a zero point takes from it."""


@dataclass(frozen=True)
class IntWeight:
    """A weight `[n, k]` of whole numbers.

    Attributes:
        bits: 8 or 4: how numbers are stored.
        shape: `(n, k)` without padding.
        group: Columns per scale; 0 if whole rows share one.
        words: int8 `[rows, columns]`, or `[rows, columns / 2]` for 4 bits; padded with zeros.
        scale: float32 `[rows]`, or `[groups, rows]`.
        sums: What every row sums up to: int32 `[rows]`; with groups, of numbers times scales, float32.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    words: Tensor
    scale: Tensor
    sums: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The three tensors, in the order of the attributes."""
        return (self.words, self.scale, self.sums)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> IntWeight:
        """Return the same weight on another device."""
        words, scale, sums = (tensor.to(device) for tensor in self.tensors)
        return replace(self, words=words, scale=scale, sums=sums)

    def clone(self) -> IntWeight:
        """Return a copy with memory of its own."""
        words, scale, sums = (tensor.clone() for tensor in self.tensors)
        return replace(self, words=words, scale=scale, sums=sums)


def refuse(name: str, k: int, group: int) -> str | None:
    """Return why the integer kernels cannot read weights of a format, or None.

    Args:
        name: The format's name.
        k: Columns of the weight.
        group: Columns per scale; 0, or as many as there are, for whole rows; more for one scale in all.
    """
    if name not in ("int4", "int5", "int6", "int7", "int8", "int8-bytes", "fp4"):
        return f"{name} is no symmetric grid of 4 to 8 bit integers, nor fp4"
    if 0 < group < k and group % HALF:
        return f"its groups of {group} inputs are no multiple of {HALF}"
    if k > MAX_COLUMNS:
        return f"sums of {k} products may overflow int32 (at most {MAX_COLUMNS})"
    return None


def prepare(packed: PackedTensor, fmt: QuantFormat) -> IntWeight:
    """Return a weight as the integer kernels read it, on the device it is on.

    Raises:
        CheckpointError: The tensors are not what the format stores.
    """
    codes, q = fmt.unpack(packed)
    n, k = codes.shape
    if isinstance(fmt, Float4):
        assert q.codebook is not None, "fp4 parameters carry a table"
        unit = _unit(q.codebook)
        numbers = (q.codebook / unit).to(torch.int8)[codes.int()]  # [n, k]
        bits = 4 if int(numbers.abs().max()) < 8 else 8
        scale, sums = _padded(q.scale[:, 0] * unit), _padded(numbers.sum(1, dtype=torch.int32))
        return IntWeight(bits, (n, k), 0, pack_bytes(numbers, bits), scale, sums)
    assert isinstance(fmt, IntFormat), fmt.name
    assert fmt.symmetric, fmt.name
    numbers = (codes.to(torch.int16) - fmt.zero_code).to(torch.int8)  # [n, k]
    group = 0 if n_groups(k, fmt.group_size) == 1 else fmt.group_size or 0
    scale = q.scale.float()
    scale = scale.expand(n, 1) if fmt.per_tensor else scale  # [n, groups]
    if group:
        parts = numbers.unflatten(1, (-1, group)).sum(-1).float()  # [n, groups]
        sums = (parts * scale).sum(1)
        scale = functional.pad(scale.T, (0, -n % PAD_ROWS)).contiguous()  # [groups, rows]
    else:
        sums = numbers.sum(1, dtype=torch.int32)
        scale = _padded(scale[:, 0])
    bits = 4 if fmt.bits == 4 else 8
    return IntWeight(bits, (n, k), group, pack_bytes(numbers, bits), scale, _padded(sums))


def restore(weight: IntWeight, fmt: QuantFormat, table: Tensor | None = None) -> PackedTensor:
    """Return the bytes a weight was prepared from; the sign of zeros may be lost in fp4.

    Args:
        weight: The weight.
        fmt: Its format.
        table: Of fp4, the table of its codes.
    """
    if isinstance(fmt, Float4):
        assert table is not None, "there are several"
        codes = nearest(numbers_of(weight).float(), table / _unit(table))
        return fmt.pack(
            codes, QParams((weight.scale[: weight.shape[0], None] / _unit(table)).contiguous(), codebook=table)
        )
    assert isinstance(fmt, IntFormat), fmt.name
    n = weight.shape[0]
    codes = (numbers_of(weight).to(torch.int16) + fmt.zero_code).to(torch.uint8)
    scale = (weight.scale[:, :n].T if weight.group else weight.scale[:n, None]).to(fmt.dtype).contiguous()
    return fmt.pack(codes, QParams(scale[0] if fmt.per_tensor else scale))


def decode(weight: IntWeight) -> Tensor:
    """Return the weight, float32 `[n, k]`, bit-equal to what its format decodes."""
    n, k = weight.shape
    scale = weight.scale[:, :n].T if weight.group else weight.scale[:n, None]  # [n, groups]
    return numbers_of(weight).float() * scale.repeat_interleave(weight.group or k, 1)


def numbers_of(weight: IntWeight) -> Tensor:
    """Return the whole numbers of a weight, int8 `[n, k]`."""
    n, k = weight.shape
    return unpack_bytes(weight.words[:n], weight.bits)[:, :k].contiguous()


def pack_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Lay int8 numbers `[n, k]` out, padded with zeros."""
    n, k = numbers.shape
    padded = functional.pad(numbers, (0, -k % PAD_COLUMNS, 0, -n % PAD_ROWS))
    if bits == 8:
        return padded.contiguous()
    halves = padded.unflatten(1, (-1, 2, HALF))  # [rows, chunks, 2, HALF]
    words: Tensor = (halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)
    return words.flatten(1)


def unpack_bytes(words: Tensor, bits: int) -> Tensor:
    """Return the int8 numbers of `pack_bytes`, padding included."""
    if bits == 8:
        return words
    chunks = words.unflatten(1, (-1, HALF))
    low = (chunks << 4) >> 4  # the shift back spreads the sign
    return torch.stack((low, chunks >> 4), 2).flatten(1)


def _unit(table: Tensor) -> float:
    """Return the smallest magnitude of a table but zero: all of fp4's values are whole multiples of it."""
    sizes = table.abs()
    return float(sizes[sizes > 0].min())


def _padded(row: Tensor) -> Tensor:
    """Return `[rows]`, padded with zeros."""
    return functional.pad(row, (0, -row.shape[0] % PAD_ROWS)).contiguous()
