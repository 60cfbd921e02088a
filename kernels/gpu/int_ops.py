"""Rounding activations and multiplying integers as one PyTorch operator, `compressor::int_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.kernels.gpu.int_launch import int_matmul, quantize
from compressor.kernels.gpu.int_weight import IntWeight, decode, numbers_of
from compressor.kernels.gpu.layout import PAD_COLUMNS
from compressor.kernels.gpu.rounding import Rounding, codes_of


def linear(x: Tensor, weight: IntWeight, rounding: Rounding, bias: Tensor | None) -> Tensor:
    """Return `round(x) @ weight.T + bias`, `[..., n]` in the dtype of `x` `[..., k]`, the product exact.

    Args:
        x: Floating point.
        weight: On the device of `x`.
        rounding: How inputs become integers.
        bias: `[n]` or None.
    """
    out: Tensor = int_linear(
        x, *weight.tensors, None if bias is None else bias.to(x.dtype), *rounding.tensors, rounding.matrix, weight.bits,
        weight.shape[0], weight.shape[1], weight.group, rounding.bits, rounding.symmetric, rounding.clip,
        rounding.mantissa, rounding.offset,
    )  # fmt: skip
    return out


@torch.library.custom_op("compressor::int_linear", mutates_args=())
def int_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    matrix: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group: int,
    input_bits: int,
    symmetric: bool,
    clip: float,
    mantissa: int | None,
    offset: int,
) -> Tensor:
    """See `linear`; attributes one by one."""
    if x.shape[-1] != k:
        raise UnsupportedError(f"inputs of {x.shape[-1]} columns for a weight of {k}", "is this the layer they go to?")
    if x.device != words.device:
        raise UnsupportedError(f"inputs on {x.device}, the weight on {words.device}", "move one to the other")
    weight = IntWeight(bits, (n, k), group, words, scale, sums)
    rounding = Rounding(
        input_bits, symmetric, clip, step, order, shift, factor, matrix=matrix, mantissa=mantissa, offset=offset
    )
    flat = x.reshape(-1, k)
    if x.device.type != "cuda":
        out = reference(flat, weight, rounding, bias)
    else:
        with torch.cuda.device(x.device):
            rows = flat if flat.stride(1) == 1 else flat.contiguous()
            columns = -(-k // PAD_COLUMNS) * PAD_COLUMNS
            out = int_matmul(*quantize(rows, rounding, columns), weight, bias, x.new_empty(len(flat), n))
    return out.view(*x.shape[:-1], n)


@int_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    matrix: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group: int,
    input_bits: int,
    symmetric: bool,
    clip: float,
    mantissa: int | None,
    offset: int,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"inputs of {x.shape[-1]} columns for a weight of {k}")
    return x.new_empty(*x.shape[:-1], n)


def reference(x: Tensor, weight: IntWeight, rounding: Rounding, bias: Tensor | None) -> Tensor:
    """Return what the kernels compute, by plain operations: sums in int32, or with groups in float64."""
    codes, scale, zero = codes_of(x, rounding)
    if weight.group:
        exact = (codes - zero[:, None]).double() @ decode(weight).double().T
    else:
        total = torch._int_mm(codes, numbers_of(weight).T) - zero[:, None] * weight.sums[: weight.shape[0]]
        exact = total.double() * weight.scale[: weight.shape[0]]
    out = exact * scale[:, None]
    return (out if bias is None else out + bias).to(x.dtype)
