"""What happens to a layer's input before the matmul: an ordered list of operations, each with one definition.

Methods that treat activations (LLM-FP4's power-of-two offsets, OutlierTune's shift, EAQuant's rotation) express
themselves as these operations; the loader stores and restores them, kernels may fuse them, and `apply` below is what
any fused version must equal. Weight-only methods leave the list empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from compressor.errors import CheckpointError


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


@dataclass(frozen=True)
class Shift:
    """Subtract a vector: `x - z`. `z` is `[in]` float32."""

    z: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return `x - z` in the dtype of `x`."""
        return x - self.z.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the shift."""
        return {"input_shift": self.z}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "shift"}


@dataclass(frozen=True)
class Pow2:
    """Multiply each channel by a power of two: `x * 2**k`, exact in floating point. `k` is `[in]` int8."""

    k: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return `x * 2**k`."""
        result: Tensor = torch.ldexp(x, self.k.to(torch.int32))
        return result.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the exponents."""
        return {"input_pow2": self.k}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "pow2"}


@dataclass(frozen=True)
class Permute:
    """Reorder channels: `x[..., order]`. `order` is `[in]` int64, a permutation."""

    order: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the reordered input."""
        return x.index_select(-1, self.order)

    def tensors(self) -> dict[str, Tensor]:
        """Return the permutation."""
        return {"input_order": self.order}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "permute"}


@dataclass(frozen=True)
class Rotate:
    """Multiply consecutive channel blocks by an orthogonal matrix: `x.blocks @ matrix`. `matrix` is `[b, b]`."""

    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the block-rotated input; the width must be a multiple of the matrix size."""
        blocks: Tensor = x.unflatten(-1, (-1, self.matrix.shape[0]))
        return (blocks @ self.matrix.to(x.dtype)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """Return the rotation."""
        return {"input_rotation": self.matrix}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "rotate"}


@dataclass(frozen=True)
class Quantize:
    """Round to symmetric integers: static with a stored scale, or dynamic with a scale from the data.

    Attributes:
        bits: Bits of one code; codes reach `+-(2**(bits-1) - 1)`.
        granularity: `tensor` (one scale) or `token` (one per row; dynamic only).
        scale: `[1]` float32 for static quantization, None for dynamic.
        clip: Share of the largest magnitude that the scale covers (dynamic only).
    """

    bits: int
    granularity: Literal["tensor", "token"] = "token"
    scale: Tensor | None = None
    clip: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32."""
        top = 2 ** (self.bits - 1) - 1
        values = x.float()
        if self.scale is not None:
            scale = self.scale
        elif self.granularity == "token":
            scale = values.abs().amax(-1, keepdim=True) * self.clip / top
        else:
            scale = values.abs().amax() * self.clip / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return ((values / scale).round().clamp(-top, top) * scale).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the static scale, if there is one."""
        return {} if self.scale is None else {"input_scale": self.scale}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "quantize", "bits": self.bits, "granularity": self.granularity, "clip": self.clip}


def apply_ops(ops: Sequence[InputOp], x: Tensor) -> Tensor:
    """Run the operations in order."""
    for op in ops:
        x = op.apply(x)
    return x


def rebuild(descriptions: Sequence[dict[str, object]], tensors: dict[str, Tensor]) -> tuple[InputOp, ...]:
    """Rebuild stored operations; at most one of each kind, so the suffixes are unambiguous.

    Raises:
        CheckpointError: Unknown operation, or one whose tensor is missing.
    """
    ops: list[InputOp] = []
    for entry in descriptions:
        name = entry.get("op")
        try:
            if name == "shift":
                ops.append(Shift(tensors["input_shift"]))
            elif name == "pow2":
                ops.append(Pow2(tensors["input_pow2"]))
            elif name == "permute":
                ops.append(Permute(tensors["input_order"]))
            elif name == "rotate":
                ops.append(Rotate(tensors["input_rotation"]))
            elif name == "quantize":
                granularity: Literal["tensor", "token"] = "tensor" if entry["granularity"] == "tensor" else "token"
                ops.append(
                    Quantize(
                        int(str(entry["bits"])), granularity, tensors.get("input_scale"), float(str(entry["clip"]))
                    )
                )
            else:
                raise CheckpointError(f"unknown input operation {name!r}", "the checkpoint needs a newer version")
        except KeyError as missing:
            raise CheckpointError(f"input operation {name!r} lacks {missing}", "the checkpoint is incomplete") from None
    return tuple(ops)
