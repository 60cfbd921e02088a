"""The layouts PyTorch's packed CPU operators read, made once from a format's codes and never saved.

`_weight_int4pack_mm_for_cpu` takes 4-bit codes in blocks of rows, means `(code - 8) * scale + zero` by them, with scale
and zero per group of columns, and computes that in float32. Codes of more than four bits become two such planes side by
side, the high and the low half of each code, which the operator adds up against the same inputs twice.
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
        planes: 4-bit planes, 1 or 2; 0 for one code per byte.
        group: Columns per scale, one of `OP_GROUPS`; 0 for one code per byte.
        codes: uint8 `[rows, planes * k / 2]` with padded rows, or int8 `[n, k]`.
        scale: bfloat16 `[planes * k / group, rows, 2]`, scale and zero of every group, or `[n]`.
        rest: bfloat16 `[groups, n]`: what the zeros of single planes lose to bfloat16; empty if nothing.
        zero_point: int8 as on disk; empty for symmetric weights.
    """

    shape: tuple[int, int]
    planes: int
    group: int
    codes: Tensor
    scale: Tensor
    rest: Tensor
    zero_point: Tensor

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


def pack_planes(codes: Tensor, planes: int) -> Tensor:
    """Pack uint8 codes `[n, k]` for the 4-bit operator, `[rows, planes * k / 2]`; padding rows hold the code 8.

    The high halves of codes of two planes come first.
    """
    n, k = codes.shape
    rows = -(-n // PAD_ROWS) * PAD_ROWS
    packed = torch.empty(rows, planes * k // 2, dtype=torch.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):  # the operator wants int32, of some rows at a time
        part = codes[start : start + _ROWS_AT_ONCE]
        wide = part if planes == 1 else torch.cat((part >> 4, part & 15), 1)
        wide = functional.pad(wide.to(torch.int32), (0, 0, 0, -len(wide) % PAD_ROWS), value=8)
        packed[start : start + len(wide)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1)
    return packed


def unpack_planes(packed: Tensor, planes: int, shape: tuple[int, int]) -> Tensor:
    """Return the uint8 codes `[n, k]`; the inverse of `pack_planes`."""
    n, k = shape
    size = block_rows()
    assert size is not None
    parts = packed.split(_ROWS_AT_ONCE)
    return torch.cat([_rows(part, planes, size, k) for part in parts])[:n]


def dequantize(weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight `[n, k]`, decoded in float32 and rounded to `dtype` once."""
    n, k = weight.shape
    size = block_rows() if weight.planes else 1
    assert size is not None
    at_once = max(size, _DECODED_AT_ONCE // k // size * size)
    steps, origins = _steps(weight)
    out = torch.empty(n, k, dtype=dtype)
    for start in range(0, n, at_once):
        rows = slice(start, min(start + at_once, len(weight.codes)))
        codes = _rows(weight.codes[rows], weight.planes, size, k) if weight.planes else weight.codes[rows]
        values = codes.float().unflatten(1, (*steps.shape[1:2], -1))  # [rows, groups, group]
        values.mul_(steps[rows])
        if origins is not None:
            values.add_(origins[rows])
        out[rows] = values.flatten(1)[: n - start]
    return out


def _steps(weight: CpuWeight) -> tuple[Tensor, Tensor | None]:
    """Return the value of one step, and that of the code 0, float32 `[rows, groups, 1]`; None for 0. Both are exact."""
    if weight.planes == 0:
        return weight.scale.float()[:, None, None], None
    groups = weight.shape[1] // weight.group
    rows = weight.scale.unflatten(0, (weight.planes, groups)).float()  # [planes, groups, rows, 2]
    step = rows[-1, ..., 0]
    origin = rows[..., 1].sum(0) - step * (8 if weight.planes == 1 else 8 * 16 + 8)
    if weight.rest.numel():
        rest = weight.rest.float().repeat_interleave(groups // len(weight.rest), 0)
        origin[:, : rest.shape[1]] += rest
    return step.t().contiguous().unsqueeze(2), origin.t().contiguous().unsqueeze(2)


def _rows(packed: Tensor, planes: int, size: int, k: int) -> Tensor:
    """Return the codes of whole blocks, uint8 `[rows, k]`."""
    half = size // 2
    blocks = packed.view(-1, planes, k, half).transpose(2, 3).contiguous()  # [blocks, planes, half, k]
    if planes == 1:
        return torch.cat((blocks & 0x0F, blocks >> 4), 2).flatten(0, 2)  # a byte holds the rows r and r + half
    high, low = blocks[:, 0], blocks[:, 1]
    return torch.cat(((high << 4) | (low & 0x0F), (high & 0xF0) | (low >> 4)), 1).flatten(0, 1)
