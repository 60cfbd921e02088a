"""The packed kernels as PyTorch operators, so that `torch.compile` sees one node and graphs can capture it.

`compressor::packed_linear` and `compressor::unpack_weight` take a `RuntimeWeight` as its tensors and numbers. On CUDA
they start the Triton kernels, on a CPU they decode in plain torch, which is what the kernels must equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.kernels.gpu.launch import COUNTERS, aligned, dense_matmul, dequantize, matmul
from compressor.kernels.gpu.layout import CODES, SPARSE, RuntimeWeight
from compressor.kernels.gpu.prepare import decode
from compressor.kernels.gpu.tiles import path_for

PATHS = ("", "small", "large", "dequant")
"""What may be asked to multiply; the empty string leaves it to `tiles.path_for`."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: RuntimeWeight, bias: Tensor | None, dtype: torch.dtype, path: str = "") -> Tensor:
    """Return `x @ weight.T + bias`, `[..., n]` in the dtype of `x` `[..., k]`.

    Args:
        x: Floating point. In float16 and bfloat16 the packed kernels multiply; otherwise the weight is written out.
        weight: On the device of `x`.
        bias: `[n]` or None.
        dtype: What a weight that is written out is rounded to first: the model's dtype.
        path: One of `PATHS`.
    """
    out: Tensor = packed_linear(
        x, *weight.tensors, None if bias is None else bias.to(x.dtype), weight.grid, weight.shape[0], weight.shape[1],
        weight.group, weight.scale_kind, weight.row_kind, dtype, path,
    )  # fmt: skip
    return out


def dense(weight: RuntimeWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight `[n, k]`, decoded in float32 and rounded to `dtype` once."""
    out: Tensor = unpack_weight(
        *weight.tensors, weight.grid, weight.shape[0], weight.shape[1], weight.group, weight.scale_kind,
        weight.row_kind, dtype,
    )  # fmt: skip
    return out


@torch.library.custom_op("compressor::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    bias: Tensor | None,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    dtype: torch.dtype,
    path: str,
) -> Tensor:
    """See `linear`; a weight's attributes one by one."""
    weight = RuntimeWeight(grid, (n, k), group, scale_kind, row_kind, words, bits, scale, zero, row, table)
    _check(x, weight, path)
    flat = x.reshape(-1, k)
    if x.device.type != "cuda":
        out = functional.linear(flat, decode(weight).to(dtype).to(x.dtype), bias)
    else:
        with torch.cuda.device(x.device):  # Triton starts kernels on the current one
            out = _on_cuda(flat, weight, bias, dtype, path or path_for(flat.shape[0]))
    return out.view(*x.shape[:-1], n)


@packed_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    bias: Tensor | None,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    dtype: torch.dtype,
    path: str,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for a weight of {k}")
    torch._check(words.shape[1] * CODES[grid] >= k, lambda: f"{list(words.shape)} words hold no {k} columns")
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("compressor::unpack_weight", mutates_args=())
def unpack_weight(
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """See `dense`; a weight's attributes one by one."""
    weight = RuntimeWeight(grid, (n, k), group, scale_kind, row_kind, words, bits, scale, zero, row, table)
    if words.device.type != "cuda":
        return decode(weight).to(dtype)
    with torch.cuda.device(words.device):
        return dequantize(weight, dtype)


@unpack_weight.register_fake
def _(
    words: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero: Tensor,
    row: Tensor,
    table: Tensor,
    grid: str,
    n: int,
    k: int,
    group: int,
    scale_kind: str,
    row_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(words.shape[1] * CODES[grid] >= k, lambda: f"{list(words.shape)} words hold no {k} columns")
    return words.new_empty(n, k, dtype=dtype)


def reserve(device: torch.device) -> None:
    """Make what graphs captured on a CUDA device will need; call it once weights are there."""
    if device.type == "cuda":
        COUNTERS.reserve(device)


def _on_cuda(x: Tensor, weight: RuntimeWeight, bias: Tensor | None, dtype: torch.dtype, path: str) -> Tensor:
    if path == "dequant" or x.dtype not in KERNEL_DTYPES or SPARSE.get(weight.grid, x.dtype) != x.dtype:
        return dense_matmul(x, weight, bias, dtype)
    return matmul(aligned(x), weight, bias, path=path)


def _check(x: Tensor, weight: RuntimeWeight, path: str) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise UnsupportedError(
            f"inputs of {x.shape[-1]} columns for a weight {list(weight.shape)}", "is this the layer they belong to?"
        )
    if x.device != weight.words.device:
        raise UnsupportedError(f"inputs on {x.device}, the weight on {weight.words.device}", "move one to the other")
    if path not in PATHS:
        raise UnsupportedError(f"no kernel path {path!r}", f"choose one of {', '.join(PATHS[1:])}")
