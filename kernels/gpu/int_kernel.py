"""What dispatch knows of the integer kernels: when they apply, and weights prepared together with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import InputOp, apply_ops
from compressor.kernels.gpu import int_ops, int_weight, ops
from compressor.kernels.gpu.int_weight import IntWeight
from compressor.kernels.gpu.kernel import refuse_device
from compressor.kernels.gpu.rounding import Rounding, fused

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem


@dataclass(frozen=True)
class RoundedLinear:
    """A weight of integers and the operations that turn its inputs into integers.

    Attributes:
        weight: In the kernels' layout.
        fmt: The format that can restore its bytes on disk.
        before: Operations no kernel does, which run first.
        rounding: The others.
        table: See `int_weight.restore`.
    """

    weight: IntWeight
    fmt: QuantFormat
    before: tuple[InputOp, ...]
    rounding: Rounding
    table: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory beside the layer's own input parameters, by name."""
        pairs = zip(("words", "scale", "sums"), self.weight.tensors, strict=True)
        return {f"runtime_{name}": tensor for name, tensor in pairs}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `treated(x) @ weight.T + bias`: operations on the input are done here, `dtype` does not matter."""
        return int_ops.linear(apply_ops(self.before, x), self.weight, self.rounding, bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return int_weight.decode(self.weight).to(dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        return int_weight.restore(self.weight, self.fmt, self.table)


def accepts(problem: Problem) -> str | None:
    """Return why the integer kernels cannot do a problem, or None."""
    if problem.rounds not in ("int", "split"):
        return "multiplies integers, and its inputs are not rounded to any"
    return refuse_device(problem) or int_weight.refuse(problem.format, problem.k, problem.group)


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Refuse: here inputs arrive rounded, and these kernels take them before that.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"a {fmt.name} layer must be prepared for kernels that round inputs", "call its `prepare` first"
    )


def prepare(packed: PackedTensor, fmt: QuantFormat, inputs: Sequence[InputOp]) -> RoundedLinear:
    """Lay a weight out for the kernels, and take over the operations on its inputs.

    Raises:
        CheckpointError: The tensors are not what the format stores.
    """
    weight = int_weight.prepare(packed, fmt)
    ops.reserve(weight.words.device)
    before, rounding = fused(inputs, weight.words.device, rotations=True)
    return RoundedLinear(weight, fmt, before, rounding, packed.tensors.get("weight_codebook"))
