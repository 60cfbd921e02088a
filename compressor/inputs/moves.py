"""Operations that move, scale or turn a layer's input; all but for rounding errors of floats without loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """Subtract a vector: `x - z`.

    Attributes:
        z: `[in]` float32.
        carry: `[out]` float32, what the layer would have made of `z`, which its output gets back; None if something
            else makes up for it.
    """

    z: Tensor
    carry: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return `x - z` in the dtype of `x`."""
        return x - self.z.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the shift, and what the output gets back."""
        return {"input_shift": self.z, **({} if self.carry is None else {"input_shift_carry": self.carry})}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "shift", "carry": self.carry is not None}


@dataclass(frozen=True)
class Scale:
    """Multiply each channel by a positive number: `x * factor`. `factor` is `[in]` float32."""

    factor: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the scaled input in the dtype of `x`."""
        return x * self.factor.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors."""
        return {"input_factor": self.factor}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "scale"}


@dataclass(frozen=True)
class Pow2:
    """Multiply each channel by a power of two: `x * 2**k`, exact in floating point. `k` is `[in]` int8."""

    k: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return `x * 2**k`."""
        factor = torch.ldexp(torch.ones_like(self.k, dtype=torch.float32), self.k.int())  # [in], exact
        return (x * factor).to(x.dtype)

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
    """Multiply consecutive channel blocks by a matrix, orthogonal up to its dtype: `x.blocks @ matrix`.

    Attributes:
        matrix: `[b, b]`, float32 or float16.
        second: Whether it is the second rotation of a layer's input, stored beside the first.
        half: Whether it is float16.
    """

    matrix: Tensor
    second: bool = False
    half: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Return the block-rotated input; the width must be a multiple of the matrix size."""
        blocks: Tensor = x.unflatten(-1, (-1, self.matrix.shape[0]))
        return (blocks @ self.matrix.to(x.dtype)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        """Return the rotation."""
        return {ROTATIONS[self.second]: self.matrix}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        flags = {"half": self.half, "second": self.second}
        return {"op": "rotate", "size": self.matrix.shape[0], **{key: True for key, set_ in flags.items() if set_}}


ROTATIONS = ("input_rotation", "input_rotation_2")
"""Suffixes of a layer's first and second rotation."""
