"""The layouts PyTorch's packed CPU operators read, made once from a format's codes and never saved.

`_weight_int4pack_mm_for_cpu` takes 4-bit codes in blocks of rows, means `(code - 8) * scale + zero` by them, with scale
and zero per group of columns, and computes that in float32. A byte of its layout holds one column of two rows, half a
block apart. Codes of more than four bits take both: the low half of a code is in one row, the high half in the other,
with 16 times the scale, so that the byte is the code; the two results are added.
`_weight_int8pack_mm` takes one signed code per byte and one scale per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

OP_GROUPS = (256, 128, 64, 32)
"""Columns that may share one scale of the 4-bit operator."""

PAD_ROWS = 64
"""Rows are padded to whole blocks of the largest size; the operator lays the rest of a block out differently."""

_BLOCK_ROWS = {"AVX512": 64, "AVX2": 32}
_ROWS_AT_ONCE = 1024

_DECODED_AT_ONCE = 1 << 18
"""Weights decoded in one step: few enough for the second-level cache, enough to make calls cheap."""


@dataclass(frozen=True)
class CpuWeight:
    """A weight `[n, k]` as the operators read it.

    Attributes:
        shape: `(n, k)` without padding.
        planes: Rows of the operator that an output takes, 1 or 2; 0 for one code per byte.
        block: Rows that the 4-bit operator interleaves; 0 for one code per byte.
        group: Columns per scale, one of `OP_GROUPS`; 0 for one code per byte.
        codes: uint8 `[rows, k / 2]` with padding rows, or int8 `[n, k]`.
        scale: bfloat16 `[k / group, rows, 2]`, scale and zero of every group, or `[n]`.
        rest: bfloat16 `[groups, n]`: what the zeros of single planes lose to bfloat16; empty if nothing.
        zero_point: int8 as on disk; empty for symmetric weights.
    """

    shape: tuple[int, int]
    planes: int
    block: int
    group: int
    codes: Tensor
    scale: Tensor
    rest: Tensor
    zero_point: Tensor

    @property
    def outputs(self) -> int:
        """Outputs that a block holds; 1 for one code per byte."""
        return self.block // self.planes if self.planes else 1

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scale.nbytes + self.rest.nbytes + self.zero_point.nbytes


def op_group(group: int) -> int | None:
    """Return the most columns per scale that the operator takes and that divide `group`, or None."""
    return next((size for size in OP_GROUPS if group % size == 0), None)


@lru_cache(maxsize=1)
def block_rows() -> int | None:
    """Return how many rows the 4-bit operator of this machine interleaves, or None where it does so in another way."""
    size = _BLOCK_ROWS.get(torch.backends.cpu.get_cpu_capability())
    if size is None:
        return None
    codes = torch.randint(0, 16, (2 * PAD_ROWS, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return size if torch.equal(_rows(packed, 1, size, codes.shape[1]), codes) else None


def pack_planes(codes: Tensor, planes: int, block: int) -> Tensor:
    """Pack uint8 codes `[n, k]` for the 4-bit operator, `[rows, k / 2]`; padding rows hold the code in the middle."""
    n, k = codes.shape
    at_once = _ROWS_AT_ONCE // planes
    packed = torch.empty(-(-n // (PAD_ROWS // planes)) * PAD_ROWS, k // 2, dtype=torch.uint8)
    parts = packed.split(_ROWS_AT_ONCE)
    for part, rows in zip(parts, codes.split(at_once), strict=True):  # the operator wants int32, of some rows at a time
        full = functional.pad(rows, (0, 0, 0, len(part) // planes - len(rows)), value=8 if planes == 1 else 128)
        wide = full if planes == 1 else interleave(full & 15, full >> 4, block)
        part.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide.to(torch.int32), 1))
    return packed


def unpack_planes(weight: CpuWeight) -> Tensor:
    """Return the uint8 codes `[n, k]`; the inverse of `pack_planes`."""
    n, k = weight.shape
    parts = weight.codes.split(_ROWS_AT_ONCE)
    return torch.cat([_rows(part, weight.planes, weight.block, k) for part in parts])[:n]


def interleave(low: Tensor, high: Tensor, block: int) -> Tensor:
    """Return what the operator's rows hold, from what the rows of low and of high halves do: `[2 * rows, ...]`."""
    return torch.stack((low.unflatten(0, (-1, block // 2)), high.unflatten(0, (-1, block // 2))), 1).flatten(0, 2)


def dequantize(weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight `[n, k]`, decoded in float32 and rounded to `dtype` once."""
    n, k = weight.shape
    size = weight.outputs
    at_once = max(size, _DECODED_AT_ONCE // k // size * size)
    steps, origins = _steps(weight)
    out = torch.empty(n, k, dtype=dtype)
    ratio = max(weight.planes, 1)  # the operator's rows for one of ours
    for start in range(0, n, at_once):
        codes = weight.codes[start * ratio : (start + at_once) * ratio]
        codes = _rows(codes, weight.planes, weight.block, k) if weight.planes else codes
        rows = slice(start, start + len(codes))
        values = codes.float().unflatten(1, (*steps.shape[1:2], -1))  # [rows, groups, group]
        values.mul_(steps[rows])
        if origins is not None:
            values.add_(origins[rows])
        out[rows] = values.flatten(1)[: n - start]
    return out


def steps_of(weight: CpuWeight) -> Tensor:
    """Return the scales that the operator holds, padding outputs too, bfloat16 `[groups, outputs]`."""
    pairs = weight.scale.view(torch.int32).squeeze(2)  # [groups, rows]: the scale is the low half
    if weight.planes == 2:
        pairs = pairs.unflatten(1, (-1, 2, weight.outputs))[:, :, 0].flatten(1)
    # As bits of float32: several times faster than reading every other number.
    return torch.bitwise_left_shift(pairs, 16).view(torch.float32).bfloat16()


def _steps(weight: CpuWeight) -> tuple[Tensor, Tensor | None]:
    """Return the value of one step, and that of the code 0, float32 `[rows, groups, 1]`; None for 0. Both are exact."""
    if weight.planes == 0:
        return weight.scale.float()[:, None, None], None
    zeros = weight.scale[..., 1].float().unflatten(1, (-1, weight.planes, weight.outputs)).sum(2).flatten(1)
    step = steps_of(weight).float()  # [groups, rows]
    origin = zeros - step * (8 if weight.planes == 1 else 8 * 16 + 8)
    if weight.rest.numel():
        rest = weight.rest.float().repeat_interleave(len(step) // len(weight.rest), 0)
        origin[:, : rest.shape[1]] += rest
    return step.t().contiguous().unsqueeze(2), origin.t().contiguous().unsqueeze(2)


def _rows(packed: Tensor, planes: int, size: int, k: int) -> Tensor:
    """Return the codes of whole blocks, uint8 `[rows, k]`."""
    blocks = packed.view(-1, k, size // 2).transpose(1, 2).contiguous()  # [blocks, half, k]
    if planes == 2:
        return blocks.flatten(0, 1)
    return torch.cat((blocks & 0x0F, blocks >> 4), 1).flatten(0, 1)  # a byte holds the rows r and r + half
