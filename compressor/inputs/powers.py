"""Rounding to signed powers with the exponent of the weights they multiply (NUPES, arXiv 2308.05600).

Only then is the product of two codes again a power of whole numbers, `|c_x c_w|**(1/a)` times a scale, which a table
of integers can give; see `compressor.kernels.reference.power`. As for weights, a value goes to the power nearest to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.activations import EXPONENT, SCALE, InputFormat
from compressor.formats.base import QParams
from compressor.formats.power import LARGEST_EXPONENT, SMALLEST_EXPONENT, Power, powers, stored_exponent


@dataclass(frozen=True)
class RoundPower:
    """Round to `scale * sign(c) * |c|**(1/a)` for whole numbers c from -Q to Q, `Q = 2**(bits-1) - 1`.

    Attributes:
        format: Bits, and what shares one scale.
        exponent: `[1]` float32, `a`.
        scale: `[1]` float32, the smallest step, of static formats; None for one per token, which reaches its largest
            magnitude.
    """

    format: InputFormat
    exponent: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == self.format.static:
            raise CheckpointError(
                f"inputs in {self.format.name} {'need' if self.format.static else 'have no'} {SCALE}",
                "the checkpoint is incomplete or config.json does not belong to it",
            )
        if self.exponent.is_meta:  # a model without values
            return
        a = float(self.exponent)
        if not stored_exponent(SMALLEST_EXPONENT) <= a <= LARGEST_EXPONENT:
            raise CheckpointError(
                f"{EXPONENT} is {a:g}, not from {SMALLEST_EXPONENT:g} to {LARGEST_EXPONENT:g}",
                "the checkpoint is damaged",
            )

    @classmethod
    def calibrated(cls, fmt: InputFormat, largest: Tensor, exponent: Tensor) -> RoundPower:
        """Return the operation for inputs of magnitudes up to `largest` (a scalar); zero gives a scale of one."""
        exponent = exponent.float().reshape(1)
        if not fmt.static:
            return cls(fmt, exponent)
        reach = powers(fmt.bits, float(exponent))[_grid(fmt).largest_code]
        largest = largest.float().reshape(1)
        return cls(fmt, exponent, torch.where(largest > 0, largest / reach, 1.0))

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32, in the dtype of `x`; what is not finite does not become so."""
        if x.numel() == 0:
            return x
        values, table = x.float(), self._table(x.device)
        steps = self._steps(values, table)
        q = QParams(steps, codebook=table, exponent=self.exponent)
        rounded = _grid(self.format).snap(values / steps, q) * steps
        return torch.where(values.isfinite(), rounded, values).to(x.dtype)

    def saturated(self, x: Tensor) -> int:
        """Return how many values of `x` lie beyond the reach of a static scale by more than rounding explains."""
        if self.scale is None:
            return 0
        table, top = self._table(x.device), _grid(self.format).largest_code
        half_step = (table[top] - table[top - 1]) / 2
        return int((x.float().abs() / self.scale > table[top] + half_step).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Return the exponent, and the static scale if there is one."""
        return {EXPONENT: self.exponent, **({} if self.scale is None else {SCALE: self.scale})}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return self.format.describe()

    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(powers(self.format.bits, float(self.exponent)), dtype=torch.float32, device=device)

    def _steps(self, values: Tensor, table: Tensor) -> Tensor:
        """Return the smallest step, float32: `[1]`, or `[..., 1]` for one per token."""
        if self.scale is not None:
            return self.scale
        steps = values.abs().amax(-1, keepdim=True) / table[_grid(self.format).largest_code]
        return torch.where(steps == 0, 1.0, steps)  # steps * Q**(1/a) that underflow are zeros anyway


def _grid(fmt: InputFormat) -> Power:
    return Power(fmt.bits, dtype=torch.float32, group_size=None)
