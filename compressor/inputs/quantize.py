"""Rounding to the grids that compressed-tensors knows: integers, FP8, NVFP4, MXFP4, MXFP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.activations import GLOBAL_SCALE, SCALE, InputFormat
from compressor.formats.e2m1 import E2M1_MAX, round_e2m1
from compressor.formats.e4m3 import E4M3_MAX
from compressor.formats.e8m0 import decode_e8m0, fit_e8m0
from compressor.formats.nvfp4 import ZERO_SCALE


@dataclass(frozen=True)
class Quantize:
    """Round to a format, bit-equal in float32 to what compressed-tensors simulates.

    Attributes:
        format: The grid, and what shares one scale.
        scale: `[1]` float: the stored scale of static formats (NVFP4: a divisor), None for dynamic ones.
        clip: Share of the largest magnitude that a scale made from the data covers.
    """

    format: InputFormat
    scale: Tensor | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if (self.scale is None) == self.format.static:
            raise CheckpointError(
                f"inputs in {self.format.name} {'need' if self.format.static else 'have no'} {SCALE} or {GLOBAL_SCALE}",
                "the checkpoint is incomplete or config.json does not belong to it",
            )

    @classmethod
    def calibrated(cls, fmt: InputFormat, largest: Tensor, dtype: torch.dtype) -> Quantize:
        """Return the operation for inputs of magnitudes up to `largest` (a scalar); a scale is stored in `dtype`.

        A largest magnitude of zero, or one that no scale fits, gives a scale that is finite and positive all the same.
        """
        if not fmt.static:
            return cls(fmt)
        largest = largest.float().reshape(1)
        if fmt.suffix == GLOBAL_SCALE:
            divisor = E4M3_MAX * top_of(fmt) / largest
            return cls(fmt, torch.where(torch.isfinite(divisor), divisor, 1.0))
        scale = (largest / top_of(fmt)).to(dtype)
        return cls(fmt, torch.where(scale == 0, torch.finfo(dtype).eps, scale))

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32, in the dtype of `x`."""
        if x.numel() == 0:
            return x
        values = x.float()
        if not self.format.symmetric:
            return self._asymmetric(values).to(x.dtype)
        if self.format.group_size is not None:
            values = values.unflatten(-1, (-1, self.format.group_size))  # [..., groups, group]
        steps = self.steps(values)
        rounded = self._snap(values / steps) * steps
        return rounded.reshape(x.shape).to(x.dtype)

    def _asymmetric(self, values: Tensor) -> Tensor:
        """Return rows rounded to even steps between their smallest and largest value; zero is always a step."""
        steps, half = 2**self.format.bits - 1, 2 ** (self.format.bits - 1)
        low = values.amin(-1, keepdim=True).clamp(max=0) * self.clip
        high = values.amax(-1, keepdim=True).clamp(min=0) * self.clip
        scale = (high - low) / steps
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        zero = (-half - low / scale).clamp_(-half, half - 1).round_()
        rounded: Tensor = ((values / scale).add_(zero).clamp_(-half, half - 1).round_() - zero) * scale
        return rounded

    def saturated(self, x: Tensor) -> int:
        """Return how many values of `x` lie beyond the reach of a static scale by more than rounding explains."""
        if not self.format.static:
            return 0
        if self.format.suffix == GLOBAL_SCALE:
            assert self.scale is not None
            # A group's scale ends at 448 over the divisor; rounding that scale, and a value, may each reach further.
            reach = E4M3_MAX * top_of(self.format) / self.scale.float() * (17 / 16) ** 2
            return int((x.float().abs() > reach).sum())
        z = x.float() / self.steps(x.float())
        top = top_of(self.format)
        low, high = (-top - 0.5, top) if self.format.kind == "int" else (-top * 17 / 16, top * 17 / 16)
        return int(((z < low) | (z > high)).sum())

    def steps(self, values: Tensor) -> Tensor:
        """Return the value of one unit of the grid, float32, broadcastable to `values`."""
        fmt = self.format
        if fmt.granularity == "tensor":
            assert self.scale is not None
            return self.scale.float()
        largest = values.abs().amax(-1, keepdim=True) * self.clip
        if fmt.scales == "e8m0":
            return decode_e8m0(fit_e8m0(largest, _EXPONENT[fmt.bits], _LARGEST_EXPONENT))
        scale = largest / top_of(fmt)
        if fmt.scales == "float":
            return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        assert self.scale is not None
        local = (self.scale.float() * scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(local == 0, ZERO_SCALE, local) / self.scale.float()

    def _snap(self, z: Tensor) -> Tensor:
        """Return the unit nearest to every `z`, ties to even codes; overwrites `z`."""
        if self.format.kind == "int":
            largest = 2 ** (self.format.bits - 1)
            return z.clamp_(-largest, largest - 1).round_()
        if self.format.bits == 8:
            return z.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        return round_e2m1(z)

    def tensors(self) -> dict[str, Tensor]:
        """Return the static scale, if there is one."""
        return {} if self.scale is None else {str(self.format.suffix): self.scale}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "quantize", "format": self.format.name, "clip": self.clip}


_EXPONENT = {4: 2, 8: 8}
"""Exponent of the largest value of E2M1 and E4M3."""

_LARGEST_EXPONENT = 254 - 8
"""So that the largest value times its scale stays finite in float32."""


def top_of(fmt: InputFormat) -> float:
    """Return what the largest magnitude is mapped to: for integers half of the steps, as in compressed-tensors."""
    if fmt.kind == "int":
        return float(2**fmt.bits - 1) / 2
    return E4M3_MAX if fmt.bits == 8 else E2M1_MAX
