"""FP8 activations times FP8 weights: rounded by our kernel, multiplied by `torch._scaled_mm`; one operator for both.

Both sides are E4M3 with one scale per row, so the matrix unit's float8 instructions apply. Sums are kept in float32
(fast accumulation is off). Weights stay as they lie on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import InputOp, apply_ops
from compressor.kernels.gpu.int_launch import quantize
from compressor.kernels.gpu.rounding import Rounding, codes_of, fused

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

OLDEST = (9, 0)
"""Compute capability from which products take a scale per row."""

ALIGNED = 16
FORMATS = ("fp8", "fp8-tensor")


@dataclass(frozen=True)
class Fp8Linear:
    """A weight of 8-bit floats and the operations that turn its inputs into such.

    Attributes:
        weight: float8_e4m3fn `[n, k]`.
        scale: float32 `[n]`.
        packed: The weight as it lies on disk; shares memory with `weight`.
        fmt: Its format.
        before: Operations on the input that no kernel does, which run first.
        rounding: The others.
    """

    weight: Tensor
    scale: Tensor
    packed: PackedTensor
    fmt: QuantFormat
    before: tuple[InputOp, ...]
    rounding: Rounding

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name."""
        return {"runtime_weight": self.weight, "runtime_scale": self.scale}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `treated(x) @ weight.T + bias`: operations on the input are done here, `dtype` does not matter."""
        bias = None if bias is None else bias.to(x.dtype)
        out: Tensor = fp8_linear(
            apply_ops(self.before, x), self.weight.view(torch.uint8), self.scale, bias,
            *self.rounding.tensors, self.rounding.matrix, self.rounding.clip,
        )  # fmt: skip
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return (self.weight.float() * self.scale[:, None]).to(dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        return self.packed


def accepts(problem: Problem) -> str | None:
    """Return why the products of 8-bit floats cannot do a problem, or None."""
    n, k = problem.n, problem.k
    reasons = {
        "multiplies 8-bit floats, and its inputs are not rounded to any": problem.rounds != "fp8",
        f"multiplies weights, does no {problem.op!r}": problem.op != "linear",
        f"runs on CUDA devices, not on {problem.device}": problem.device != "cuda",
        f"needs compute capability 9.0, the device has {'.'.join(map(str, problem.capability))}": (
            problem.capability < OLDEST
        ),
        f"gives bfloat16, not {problem.dtype}": problem.dtype != torch.bfloat16,
        f"{problem.format} has not one scale per row of 8-bit floats": problem.format not in FORMATS,
        f"takes multiples of {ALIGNED} inputs and outputs, not {k} and {n}": bool(n % ALIGNED or k % ALIGNED),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def prepare(packed: PackedTensor, fmt: QuantFormat, inputs: Sequence[InputOp]) -> Fp8Linear:
    """Take over a weight and the operations on its inputs.

    Raises:
        CheckpointError: The tensors are not what the format stores.
    """
    _, q = fmt.unpack(packed)  # checks the tensors
    weight = packed.tensors["weight"]
    scale = q.scale.float().flatten().expand(len(weight)).contiguous()
    return Fp8Linear(weight, scale, packed, fmt, *fused(inputs, weight.device, rotations=True))


@torch.library.custom_op("compressor::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    matrix: Tensor | None,
    clip: float,
) -> Tensor:
    """Return `round(x) @ (weight * scale).T + bias`, `[..., n]` in the dtype of `x`; see `Fp8Linear` and `Rounding`.

    The weight is given as bytes.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise UnsupportedError(f"inputs of {x.shape[-1]} columns for a weight of {k}", "is this the layer they go to?")
    floats = weight.view(torch.float8_e4m3fn)
    rounding = Rounding(8, True, clip, step, order, shift, factor, floating=True, matrix=matrix)
    flat = x.reshape(-1, k)
    if x.device.type != "cuda":
        codes, rows, _ = codes_of(flat, rounding)
        exact = codes.view(torch.float8_e4m3fn).double() @ floats.double().T * rows[:, None] * scale
        out = (exact if bias is None else exact + bias).to(x.dtype)
    else:
        with torch.cuda.device(x.device):
            codes, rows, _ = quantize(flat if flat.stride(1) == 1 else flat.contiguous(), rounding, k)
            out = scaled_product(codes, rows, floats, scale, bias).to(x.dtype)
    return out.view(*x.shape[:-1], n)


@fp8_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    matrix: Tensor | None,
    clip: float,
) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"inputs of {x.shape[-1]} columns for {weight.shape[1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def scaled_product(codes: Tensor, rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `(codes * rows) @ (weight * scale).T + bias`, bfloat16 `[m, n]`.

    Args:
        codes: E4M3 bytes `[m, k]`, int8.
        rows: float32 `[m]`, scales of the codes.
        weight: float8_e4m3fn `[n, k]`.
        scale: float32 `[n]`.
        bias: `[n]` or None.
    """
    if codes.shape[0] == 0:
        return codes.new_empty(0, len(weight), dtype=torch.bfloat16)
    floats = codes.view(torch.float8_e4m3fn)
    out: Tensor = torch._scaled_mm(
        floats, weight.T, rows[:, None], scale[None], None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip
    return out
