"""What every operation on a layer's input offers, and what attention multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

OPERANDS = ("query", "key", "probability", "value")
"""What attention multiplies, in the order in which it is met, and stored."""


class InputOp(Protocol):
    """One step on `x` `[..., in]`. Float in, float out: quantization is simulated here and real in kernels."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the transformed input, same shape and dtype."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return on-disk suffix -> tensor; empty for operations without parameters."""
        ...

    def describe(self) -> dict[str, object]:
        """Return JSON that, with `tensors`, rebuilds the operation."""
        ...


def apply_ops(ops: Sequence[InputOp], x: Tensor) -> Tensor:
    """Run the operations in order."""
    for op in ops:
        x = op.apply(x)
    return x
