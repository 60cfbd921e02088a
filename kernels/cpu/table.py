"""Multiplying by weights whose 4-bit codes index a table, as they lie on disk: E2M1 floats, codebooks and powers.

PyTorch has no operator for them. Decoding looks up two codes at a time, in a table of all 256 pairs, and some rows at a
time, in memory that is used again; it gives the reference's values bit for bit, faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.base import PackedTensor, QuantFormat, require_layout
from compressor.formats.e2m1 import decode_e2m1
from compressor.formats.e8m0 import decode_e8m0
from compressor.kernels.reference.linear import FEW_ROWS, ROWS_ALIGNED, rows_of

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

NAMES = ("nvfp4", "mxfp4", "fp4", "power4", "codebook2", "codebook3", "codebook4")
"""Formats that keep 4 bits per code, the even column in a byte's low half."""

AT_ONCE = 1 << 20
"""Weights decoded in one step: few enough for caches, enough to make calls cheap."""


@dataclass(frozen=True)
class TableWeight:
    """A weight as it lies on disk, checked once, with the table of all pairs of codes.

    Attributes:
        packed: The weight.
        pairs: int64 `[256]`: what the two codes of every byte mean at scale 1, two float32 each.
        divisor: float32 `[1]` by which scales are divided; empty for none.
    """

    packed: PackedTensor
    pairs: Tensor
    divisor: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name; but for the pairs it is what lies on disk."""
        return {f"runtime_{suffix}": tensor for suffix, tensor in self.packed.tensors.items()}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x @ weight.T + bias`; see `kernels.reference.linear.packed_linear`."""
        bias = None if bias is None else bias.to(x.dtype)
        out: Tensor = table_linear(x, *self._stored, bias, *self.packed.shape, dtype)
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return _dense(*self._stored, self.packed.shape, dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        return self.packed

    @property
    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = self.packed.tensors
        scale = tensors["weight_scale"]
        scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
        return tensors["weight_packed"], scale, self.divisor, self.pairs


def accepts(problem: Problem) -> str | None:
    """Return why a weight is not read by pairs of codes, or None."""
    if problem.op != "linear":
        return f"multiplies weights, does no {problem.op!r}"
    if problem.device != "cpu":
        return f"runs on CPUs, not on {problem.device}"
    if problem.format not in NAMES:
        return f"looks up codes of 4 bits, which {problem.format} is not made of"
    return f"takes codes in pairs, not {problem.k} in a row" if problem.k % 2 else None


def prepare(packed: PackedTensor, fmt: QuantFormat) -> TableWeight:
    """Check a weight and make its table; its bytes stay what they are.

    Raises:
        CheckpointError: The tensors are not what the format stores.
    """
    require_layout(fmt, packed)
    # What unpacks all of a weight also checks its table; some rows are enough for that.
    _, q = fmt.unpack(rows_of(packed, fmt, 0, min(packed.shape[0], ROWS_ALIGNED)))
    table = decode_e2m1(torch.arange(16, dtype=torch.uint8)) if q.codebook is None else q.codebook
    full = functional.pad(table.float(), (0, 16 - len(table)))
    byte = torch.arange(256)
    pairs = torch.stack((full[byte & 15], full[byte >> 4]), 1).view(torch.int64).flatten()
    return TableWeight(packed, pairs, torch.empty(0) if q.global_scale is None else q.global_scale)


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by a weight that has not been prepared."""
    return prepare(packed, fmt).linear(x, bias, dtype)


@torch.library.custom_op("compressor::table_linear", mutates_args=())
def table_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    divisor: Tensor,
    pairs: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `TableWeight.linear`; its attributes one by one, so that `torch.compile` sees one node."""
    flat = x.reshape(-1, k)
    if len(flat) > FEW_ROWS:
        dense = _dense(packed, scale, divisor, pairs, (n, k), dtype).to(x.dtype)
        out = functional.linear(flat, dense, bias)
    else:
        out = x.new_empty(len(flat), n)
        for rows, values in _parts(packed, scale, divisor, pairs, (n, k)):
            weight = values.to(dtype).to(x.dtype)
            out[:, rows] = functional.linear(flat, weight, None if bias is None else bias[rows])
    return out.view(*x.shape[:-1], n)


@table_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    divisor: Tensor,
    pairs: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for a weight of {k}")
    return x.new_empty(*x.shape[:-1], n)


def _dense(
    packed: Tensor, scale: Tensor, divisor: Tensor, pairs: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    for rows, values in _parts(packed, scale, divisor, pairs, shape):
        out[rows] = values
    return out


def _parts(
    packed: Tensor, scale: Tensor, divisor: Tensor, pairs: Tensor, shape: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Yield float32 rows of the weight, in order; each is overwritten by the next."""
    n, k = shape
    stored = packed.view(torch.uint8)[:, : k // 2]
    at_once = max(1, AT_ONCE // k)
    index = torch.empty(min(at_once, n), k // 2, dtype=torch.int32)
    found = torch.empty(index.numel(), dtype=torch.int64)
    for start in range(0, n, at_once):
        rows = slice(start, min(start + at_once, n))
        part, chosen = index[: rows.stop - start], found[: (rows.stop - start) * k // 2]
        part.copy_(stored[rows])
        torch.index_select(pairs, 0, part.view(-1), out=chosen)
        steps = _steps(scale if scale.ndim == 1 else scale[rows], divisor)
        values = chosen.view(torch.float32).view(len(part), steps.shape[-1], -1)
        values.mul_(steps.unsqueeze(-1))
        yield rows, values.view(len(part), k)


def _steps(scale: Tensor, divisor: Tensor) -> Tensor:
    """Return float32 scales in the shape they are stored in: bytes are E4M3 with a divisor, else exponents."""
    if scale.dtype != torch.uint8:
        return scale.float()
    return scale.view(torch.float8_e4m3fn).float() / divisor if divisor.numel() else decode_e8m0(scale)
