"""A linear layer on packed weights: decode everything, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.base import PackedTensor, QuantFormat


def dequantize(packed: PackedTensor, fmt: QuantFormat, dtype: torch.dtype) -> Tensor:
    """Return the weight `[out, in]`: decoded in float32, rounded to `dtype` once."""
    return fmt.decode(*fmt.unpack(packed)).to(dtype)


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
    weight = dequantize(packed, fmt, dtype).to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
