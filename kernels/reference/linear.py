"""A linear layer on packed weights: decode, then multiply."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.base import PackedTensor, QuantFormat

AT_ONCE = 1 << 19
"""Weights decoded in one step on a CPU: what lies between two operations stays in its cache."""

FEW_ROWS = 64
"""Up to how many rows of activations each part is multiplied as it is decoded, and never lies in memory whole. With
more the product takes most of the time, and is better done in one."""

ROWS_ALIGNED = 128
"""Rows whose tensors can be told apart in every format: tiles of scales, words of zero points."""


def dequantize(packed: PackedTensor, fmt: QuantFormat, dtype: torch.dtype) -> Tensor:
    """Return the weight `[out, in]`: decoded in float32, rounded to `dtype` once."""
    if not _in_parts(packed):
        return fmt.decode(*fmt.unpack(packed)).to(dtype)
    device = next(iter(packed.tensors.values())).device
    out = torch.empty(packed.shape, dtype=dtype, device=device)
    for rows, part in _parts(packed, fmt):
        out[rows] = fmt.decode(*fmt.unpack(part))
    return out


def rows_of(packed: PackedTensor, fmt: QuantFormat, start: int, stop: int) -> PackedTensor:
    """Return some rows of a packed weight; shares memory with it.

    Args:
        packed: The weight.
        fmt: Its format.
        start: First row, a multiple of `ROWS_ALIGNED`.
        stop: Behind the last row; a multiple of it too, or all rows.
    """
    n, k = packed.shape
    whole, before, part = fmt.layout((n, k)), fmt.layout((start, k)), fmt.layout((stop - start, k))
    tensors = {}
    for suffix, tensor in packed.tensors.items():
        offset, size = before[suffix].shape[0], part[suffix].shape[0]
        if suffix == "weight_shape":
            tensor = torch.tensor((stop - start, k))
        elif whole[suffix].shape != fmt.layout((0, k))[suffix].shape:  # else it is the same for all rows
            tensor = tensor[offset : offset + size]
        tensors[suffix] = tensor
    return PackedTensor(packed.format, (stop - start, k), tensors)


def packed_linear(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `x @ weight.T + bias`, `[..., out]` in the dtype of `x`.

    Args:
        x: `[..., in]`, floating point.
        packed: The weight as it lies on disk.
        fmt: The format that packed it.
        bias: `[out]` or None.
        dtype: The model's dtype: what the decoded weight is rounded to. The product itself is computed in the dtype
            of `x`; with both float32 nothing is ever rounded below float32.
    """
    bias = None if bias is None else bias.to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) > FEW_ROWS or not _in_parts(packed):
        return functional.linear(x, dequantize(packed, fmt, dtype).to(x.dtype), bias)
    out = x.new_empty(len(flat), packed.shape[0])
    for rows, part in _parts(packed, fmt):
        weight = fmt.decode(*fmt.unpack(part)).to(dtype).to(x.dtype)
        out[:, rows] = functional.linear(flat, weight, None if bias is None else bias[rows])
    return out.view(*x.shape[:-1], -1)


def _in_parts(packed: PackedTensor) -> bool:
    device = next(iter(packed.tensors.values())).device
    return packed.shape[0] * packed.shape[1] > AT_ONCE and device.type == "cpu"


def _parts(packed: PackedTensor, fmt: QuantFormat) -> Iterator[tuple[slice, PackedTensor]]:
    """Yield the weight some rows at a time."""
    n, k = packed.shape
    step = max(1, AT_ONCE // k // ROWS_ALIGNED) * ROWS_ALIGNED
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield slice(start, stop), rows_of(packed, fmt, start, stop)
