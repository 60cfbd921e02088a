"""What dispatch knows of PyTorch's packed CPU operators: when they apply, and weights prepared for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.ints import IntFormat
from compressor.kernels.cpu import matmul
from compressor.kernels.cpu.layout import CpuWeight, block_rows, dequantize, op_group
from compressor.kernels.cpu.matmul import PACKED_ROWS
from compressor.kernels.cpu.prepare import NAMES, planes_of, restore
from compressor.kernels.cpu.prepare import prepare as prepare_layout

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

MOST_CODES = 2**31
BYTES_AT_ONCE = 16


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the operators' layout, with the format that can restore its bytes on disk.

    Attributes:
        weight: The layout.
        fmt: The format.
        path: As of `matmul.linear`: empty, or `decode` where that kernel was forced.
    """

    weight: CpuWeight
    fmt: IntFormat
    path: str = ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name; empty ones left out."""
        names = ("codes", "scale", "rest", "zero_point")
        pairs = ((name, getattr(self.weight, name)) for name in names)
        return {f"runtime_{name}": tensor for name, tensor in pairs if tensor.numel()}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x @ weight.T + bias`; see `matmul.linear`."""
        return matmul.linear(x, self.weight, bias, dtype, self.path)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return dequantize(self.weight, dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        return restore(self.weight, self.fmt)


def accepts_few(problem: Problem) -> str | None:
    """Return why the packed operators should not do a problem, or None."""
    if reason := accepts(problem):
        return reason
    most = PACKED_ROWS[_planes(problem)]
    if problem.m > most:
        return f"{problem.m} rows: beyond {most} it is faster to decode the weight once and multiply densely"
    return None


def accepts(problem: Problem) -> str | None:
    """Return why a weight cannot have the operators' layout, or None."""
    if problem.op != "linear":
        return f"multiplies weights, does no {problem.op!r}"
    if problem.device != "cpu":
        return f"runs on CPUs, not on {problem.device}"
    if problem.format not in NAMES:
        return f"multiplies integers: PyTorch has no packed CPU operator for {problem.format}"
    if problem.dtype != torch.bfloat16:
        reason = "slow in any other dtype" if problem.dtype == torch.float16 else "the reference keeps them exact"
        return f"takes bfloat16 activations, not {str(problem.dtype).removeprefix('torch.')}: {reason}"
    if problem.scale != torch.bfloat16:
        return f"takes bfloat16 scales, not {str(problem.scale).removeprefix('torch.')}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"is fast with AVX2 or AVX-512, not on this CPU ({torch.backends.cpu.get_cpu_capability()})"
    planes = _planes(problem)
    if problem.n * problem.k * max(planes, 1) >= MOST_CODES:
        return f"counts codes in 32 bits, {problem.n * problem.k} weights are too many"
    if planes == 0:
        # It reads 16 codes at a time, past the end of the memory if it must.
        return None if problem.k % BYTES_AT_ONCE == 0 else f"takes multiples of {BYTES_AT_ONCE} inputs, not {problem.k}"
    group = problem.k if _whole_rows(problem) else problem.group
    if op_group(group) is None:
        return f"takes one scale per 32, 64, 128 or 256 inputs or multiples of them, not per {group}"
    return None if block_rows() else "this PyTorch lays 4-bit weights out in a way that is not known"


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by a weight that has not been prepared; prepares it anew each time."""
    return matmul.linear(x, prepare_layout(packed, fmt), bias, dtype)


def run_decoded(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `run`, never with the packed operators."""
    return matmul.linear(x, prepare_layout(packed, fmt), bias, dtype, "decode")


def prepare(packed: PackedTensor, fmt: QuantFormat) -> PreparedWeight:
    """Lay a weight out for the operators.

    Raises:
        UnsupportedError: No operator takes it.
        CheckpointError: The tensors are not what the format stores.
    """
    weight = prepare_layout(packed, fmt)
    assert isinstance(fmt, IntFormat)
    return PreparedWeight(weight, fmt)


def prepare_decoded(packed: PackedTensor, fmt: QuantFormat) -> PreparedWeight:
    """As `prepare`, for a weight that is always decoded: what forcing that kernel asks for."""
    weight = prepare_layout(packed, fmt)
    assert isinstance(fmt, IntFormat)
    return PreparedWeight(weight, fmt, "decode")


def _planes(problem: Problem) -> int:
    return planes_of(NAMES[problem.format], not problem.format.endswith("-asym"), _whole_rows(problem))


def _whole_rows(problem: Problem) -> bool:
    """Tell whether a row, or the whole matrix, shares one scale."""
    return problem.group in (0, problem.n * problem.k)
