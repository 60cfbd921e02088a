"""Multiplying by a prepared weight on the CPU: the packed operators for few rows, decoding once for many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.kernels.cpu.decode import decoded_linear
from compressor.kernels.cpu.layout import CpuWeight, dequantize

PACKED_ROWS = {1: 48, 2: 20, 0: 28}
"""Up to how many rows of activations the packed operator is faster than decoding, by planes of the weight.

Measured with `python -m compressor.kernels.bench --cpu` on AVX-512 with AMX, whose dense products are fast (without AMX
decoding wins some rows later); hardly depends on the shape, as both costs grow with the number of weights.
"""


def linear(x: Tensor, weight: CpuWeight, bias: Tensor | None, dtype: torch.dtype, path: str = "") -> Tensor:
    """Return `x @ weight.T + bias`, `[..., n]` in the dtype of `x` `[..., k]`.

    Args:
        x: Floating point. Only bfloat16 meets the packed operators; otherwise the weight is decoded.
        weight: The weight.
        bias: `[n]` or None.
        dtype: What a decoded weight is rounded to first: the model's dtype.
        path: `packed` or `decode`; by `PACKED_ROWS` if empty.
    """
    n, k = weight.shape
    flat = x.reshape(-1, k)
    few = flat.shape[0] <= PACKED_ROWS[weight.planes]
    if x.dtype == torch.bfloat16 and (few if not path else path == "packed"):
        out = packed_linear(flat, weight)
        if bias is not None:
            out += bias
    elif x.dtype == dtype == torch.bfloat16:
        out = decoded_linear(flat, weight, None if bias is None else bias.to(x.dtype))
    else:
        dense = dequantize(weight, dtype).to(x.dtype)
        out = functional.linear(flat, dense, None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], n)


def packed_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Return `x @ weight.T` for bfloat16 `x` `[m, k]`; products and sums in float32."""
    n = weight.shape[0]
    x = x.contiguous()
    if weight.planes == 0:
        whole: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight.codes, weight.scale)
        return whole
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, weight.group, weight.scale)
    if weight.planes == 2:
        low, high = out.view(len(x), -1, 2, weight.outputs).unbind(2)
        out = torch.add(low, high).view(len(x), -1)
    if out.shape[1] > n:
        out = out[:, :n]
    if weight.rest.numel():
        sums = x.unflatten(1, (len(weight.rest), -1)).sum(2)  # [m, groups]
        out = torch.addmm(out, sums, weight.rest)
    return out
