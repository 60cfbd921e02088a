"""LLM-FP4's 4-bit floats as whole numbers on the CPU: one per byte, and one scale per output behind the product.

All values of a split are whole multiples of one power of two, from -64 to 64 (see `docs/activations.md`), which
bfloat16 and PyTorch's operator for bytes hold exactly. Looking codes up takes several times as long as multiplying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QParams, QuantFormat
from compressor.formats.float4 import Float4
from compressor.kernels.cpu import table
from compressor.kernels.cpu.table import TableWeight

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

FEW_ROWS = 20
"""Up to how many rows of activations `_weight_int8pack_mm` is faster than widening the numbers first."""

BYTES_AT_ONCE = 16
"""Bytes the operator reads at a time, past the end of the memory if it must."""

PART = 1 << 22
"""Weights widened before they are multiplied: more would need as much memory as a dense layer."""


@dataclass(frozen=True)
class NumbersWeight:
    """A weight of whole numbers.

    Attributes:
        numbers: int8 `[n, k]`.
        scale: float32 `[n]`, what the number 1 means.
        ones: bfloat16 `[n]`, the scales the operator asks for.
        fmt: The format that can restore its bytes on disk.
        table: float32 `[16]`, what the format's codes mean.
    """

    numbers: Tensor
    scale: Tensor
    ones: Tensor
    fmt: Float4
    table: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name."""
        names = ("numbers", "scale", "ones", "table")
        return {f"runtime_{name}": getattr(self, name) for name in names}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x @ weight.T + bias`, `[..., n]` in the dtype of `x` `[..., k]`.

        Sums are those of a dense bfloat16 layer of the numbers, times scales in float32; in other dtypes than bfloat16
        the weight is decoded and rounded to `dtype` first.
        """
        n, k = self.numbers.shape
        flat = x.reshape(-1, k)
        if x.dtype != torch.bfloat16:
            dense = self.dequantize(dtype).to(x.dtype)
            return functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        if len(flat) <= FEW_ROWS and k % BYTES_AT_ONCE == 0:
            sums: Tensor = torch.ops.aten._weight_int8pack_mm(flat.contiguous(), self.numbers, self.ones)
        else:
            parts = self.numbers.split(max(1, PART // k))
            sums = torch.cat([functional.linear(flat, part.to(x.dtype)) for part in parts], 1)
        out = sums.float().mul_(self.scale)
        if bias is not None:
            out += bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], n)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return (self.numbers.float() * self.scale[:, None]).to(dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        unit = _unit(self.table)
        codes = torch.empty(256, dtype=torch.uint8)
        for code, value in reversed(list(enumerate(self.table.tolist()))):  # the first of two zeros counts
            codes[int(value / unit) % 256] = code
        scale = (self.scale / unit)[:, None].contiguous()
        return self.fmt.pack(_looked_up(codes, self.numbers.view(torch.uint8)), QParams(scale, codebook=self.table))


def accepts(problem: Problem) -> str | None:
    """Return why a weight is not kept as whole numbers, or None."""
    if problem.op != "linear":
        return f"multiplies weights, does no {problem.op!r}"
    if problem.device != "cpu":
        return f"runs on CPUs, not on {problem.device}"
    if problem.format != "fp4":
        return f"{problem.format} is not made of whole multiples of one number per output"
    if problem.dtype != torch.bfloat16:
        return f"takes bfloat16 activations, not {str(problem.dtype).removeprefix('torch.')}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"is fast with AVX2 or AVX-512, not on this CPU ({torch.backends.cpu.get_cpu_capability()})"
    return None


def prepare(packed: PackedTensor, fmt: QuantFormat) -> NumbersWeight | TableWeight:
    """Lay a weight out, one number per byte; one with codes of -0, which numbers would lose, stays as it is.

    Raises:
        UnsupportedError: Another format.
        CheckpointError: The tensors are not what the format stores.
    """
    if not isinstance(fmt, Float4):
        raise UnsupportedError(f"{fmt.name} is not made of whole numbers", "use the reference")
    codes, q = fmt.unpack(packed)
    assert q.codebook is not None, "fp4 parameters carry a table"
    if bool((codes == 8).any()):
        return table.prepare(packed, fmt)
    unit = _unit(q.codebook)
    numbers = _looked_up((q.codebook / unit).to(torch.int8), codes)
    scale = q.scale[:, 0] * unit
    return NumbersWeight(numbers, scale, torch.ones(len(scale), dtype=torch.bfloat16), fmt, q.codebook.clone())


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by a weight that has not been prepared; prepares it anew each time."""
    return prepare(packed, fmt).linear(x, bias, dtype)


def _unit(values: Tensor) -> float:
    """Return the smallest magnitude of a table but zero: all of fp4's values are whole multiples of it."""
    sizes = values.abs()
    return float(sizes[sizes > 0].min())


def _looked_up(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]` of a uint8 matrix, some rows at a time."""
    out = torch.empty(index.shape, dtype=values.dtype)
    for rows in _rows(index.shape):
        out[rows] = values.index_select(0, index[rows].flatten().int()).view(-1, index.shape[1])
    return out


def _rows(shape: torch.Size) -> Iterator[slice]:
    step = max(1, table.AT_ONCE // max(shape[1], 1))
    return (slice(start, start + step) for start in range(0, shape[0], step))
