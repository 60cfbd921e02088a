"""Rounding to LLM-FP4's floats: any split of the bits, a real scale, powers of two per channel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.formats.activations import SCALE
from compressor.formats.small_floats import TINY, largest_value, offsets_of, round_float


@dataclass(frozen=True)
class RoundFloat:
    """Round to small floats with a real-valued bias and a power of two per channel: `2^-k Q(2^k x)`.

    Attributes:
        bits: Bits of one code.
        scale: `[1]` float32, `2^-bias`.
        mantissa: `[1]` uint8, how many of the bits are mantissa.
        k: `[in]` int8, exponents of the channels' own factors; not negative.
    """

    bits: int
    scale: Tensor
    mantissa: Tensor
    k: Tensor

    @classmethod
    def covering(cls, bits: int, mantissa: int, loudest: Tensor, offsets: bool) -> RoundFloat:
        """Return the operation whose largest value is that of the inputs.

        Args:
            bits: Bits of one code.
            mantissa: Mantissa bits.
            loudest: `[in]` largest magnitude of every channel; all zero gives a scale of one.
            offsets: Whether quiet channels are multiplied by powers of two.
        """
        top = loudest.float().amax().reshape(1)
        scale = torch.where(top > TINY, top / largest_value(bits, mantissa), torch.ones_like(top))
        split = torch.tensor([mantissa], dtype=torch.uint8, device=loudest.device)
        start = cls(bits, scale, split, torch.zeros(len(loudest), dtype=torch.int8, device=loudest.device))
        return start.with_scale(scale, loudest if offsets and bool(top > TINY) else None)

    def with_scale(self, scale: Tensor, loudest: Tensor | None) -> RoundFloat:
        """Return the same with another scale; powers of two follow from the channels' largest magnitudes if given."""
        k = self.k if loudest is None else offsets_of(loudest, scale, self.bits, int(self.mantissa))
        return replace(self, scale=scale, k=k)

    def apply(self, x: Tensor) -> Tensor:
        """Return the rounded input, computed in float32, in the dtype of `x`."""
        ones, k = torch.ones_like(self.k, dtype=torch.float32), self.k.int()
        up, down = torch.ldexp(ones, k), torch.ldexp(ones, -k)  # [in], exact; once per channel is faster than per value
        rounded = self.snap((x.float() * up).div_(self.scale))
        return rounded.mul_(self.scale).mul_(down).to(x.dtype)

    def snap(self, z: Tensor) -> Tensor:
        """Return the value at bias 0 nearest to every float32 `z`; overwrites `z`."""
        return round_float(z, self.bits, int(self.mantissa))

    def saturated(self, x: Tensor) -> int:
        """Return how many values of `x` lie beyond the largest float by more than rounding explains."""
        z = torch.ldexp(x.float(), self.k.to(torch.int32)) / self.scale
        mantissa = int(self.mantissa)
        half_step = 0.5 / (2 ** (mantissa + 1) - 1)  # in units of the largest value
        return int((z.abs() > largest_value(self.bits, mantissa) * (1 + half_step)).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Return scale, split and exponents."""
        return {SCALE: self.scale, "input_mantissa": self.mantissa, "input_pow2": self.k}

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"op": "float", "format": f"fpq{self.bits}", "bits": self.bits}
