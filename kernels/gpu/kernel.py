"""What dispatch knows of the Triton kernels: when they apply, and weights prepared for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.formats.base import PackedTensor, QuantFormat
from compressor.kernels.gpu import experts, layout, ops, sparse
from compressor.kernels.gpu.launch import Routing
from compressor.kernels.gpu.layout import RuntimeWeight
from compressor.kernels.gpu.prepare import prepare as prepare_layout
from compressor.kernels.gpu.prepare import restore

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

TRITON = "triton"
"""What `COMPRESS_KERNEL` and reports call the packed kernels."""

OLDEST = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TritonWeight:
    """A weight in the kernels' layout, with the format that can restore its bytes on disk."""

    weight: RuntimeWeight
    fmt: QuantFormat

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name; empty ones left out."""
        names = ("words", "bits", "scale", "zero", "row", "table")
        pairs = zip(names, self.weight.tensors, strict=True)
        return {f"runtime_{name}": tensor for name, tensor in pairs if tensor.numel()}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x @ weight.T + bias`; see `ops.linear`."""
        return ops.linear(x, self.weight, bias, dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return ops.dense(self.weight, dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        return restore(self.weight, self.fmt)


@dataclass(frozen=True)
class PrunedWeight:
    """A 16-bit weight of which two of every four columns are kept; see `sparse.pack`."""

    weight: RuntimeWeight

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name."""
        return {"runtime_words": self.weight.words, "runtime_bits": self.weight.bits}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x @ weight.T + bias`; see `ops.linear`."""
        return ops.linear(x, self.weight, bias, dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]` in `dtype`; zeros have lost their sign."""
        return ops.dense(self.weight, dtype)


@dataclass(frozen=True)
class ExpertStack:
    """One projection of all experts, for products in one launch; members share its memory.

    Attributes:
        weight: The stack, see `experts.stack`.
        members: What takes the place of the experts' own prepared weights.
    """

    weight: RuntimeWeight
    members: tuple[TritonWeight, ...]

    @classmethod
    def of(cls, prepared: Sequence[object]) -> ExpertStack | None:
        """Return the stack of the prepared weights of all experts, or None if these kernels do not multiply them."""
        weights = [weight for weight in prepared if isinstance(weight, TritonWeight)]
        if len(weights) < len(prepared) or (stacked := experts.stack([weight.weight for weight in weights])) is None:
            return None
        views = tuple(TritonWeight(experts.member(stacked, i), weight.fmt) for i, weight in enumerate(weights))
        return cls(stacked, views)

    def linear(self, x: Tensor, routing: Routing, rows: int) -> Tensor:
        """Return `[rows, out]`; see `experts.linear`."""
        return experts.linear(x, self.weight, routing, rows)


def accepts(problem: Problem) -> str | None:
    """Return why the Triton kernels cannot do a problem, or None."""
    return refuse_device(problem) or layout.refuse(problem.format, problem.k, problem.group)


def refuse_device(problem: Problem) -> str | None:
    """Return why no Triton kernel can do a problem, whatever its weight, or None."""
    if problem.op != "linear":
        return f"multiplies weights, does no {problem.op!r}"
    if problem.device != "cuda":
        return f"runs on CUDA devices, not on {problem.device}"
    if missing := _missing():
        return missing
    if problem.capability < OLDEST:
        return f"needs compute capability 8.0, the device has {problem.capability[0]}.{problem.capability[1]}"
    if problem.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32 activations, not {problem.dtype}"
    return None


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by a weight that has not been prepared; prepares it anew each time."""
    return ops.linear(x, prepare_layout(packed, fmt), bias, dtype)


def prepare(packed: PackedTensor, fmt: QuantFormat) -> TritonWeight:
    """Lay a weight out for the kernels.

    Raises:
        UnsupportedError: No kernel reads it.
        CheckpointError: The tensors are not what the format stores.
    """
    weight = prepare_layout(packed, fmt)
    ops.reserve(weight.words.device)
    return TritonWeight(weight, fmt)


def prepare_pruned(problem: Problem, weight: Tensor) -> PrunedWeight | None:
    """Lay a dense weight out if these kernels gain by its zeros: two of every four, and 16-bit numbers; else None."""
    if problem.dtype not in ops.KERNEL_DTYPES or refuse_device(problem) is not None:
        return None
    packed = sparse.pack(weight)
    if packed is None:
        return None
    ops.reserve(weight.device)
    return PrunedWeight(packed)


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if torch.version.hip is not None:
        return "is written for CUDA, and this PyTorch is built for ROCm"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return None
