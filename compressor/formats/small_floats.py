"""Floats of 4, 6 or 8 bits with any split into exponent and mantissa, all codes finite, as LLM-FP4 has them.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, section 3, equations 5 to 9.
With E exponent and M mantissa bits, `E + M + 1 = bits`, values at bias 0 are `2^p (1 + f / 2^M)` for p = 1 ... 2^E - 1
and `2 f / 2^M` for p = 0. A real-valued bias is a factor in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS: dict[int, tuple[int, ...]] = {4: (1, 2, 0), 6: (2, 3, 1, 4, 0), 8: (3, 4, 2, 5, 6)}
"""Bits -> mantissa bits worth trying, the one of min-max fitting first."""


TINY = 1e-30
"""Magnitudes below count as zero."""


def exponent_codes(bits: int, mantissa: int) -> int:
    """Return `2^E`, the number of exponents."""
    return 1 << (bits - 1 - mantissa)


def largest_value(bits: int, mantissa: int) -> float:
    """Return the largest value at bias 0."""
    return (2 - 2.0**-mantissa) * 2.0 ** (exponent_codes(bits, mantissa) - 1)


def round_float(z: Tensor, bits: int, mantissa: int) -> Tensor:
    """Round float32 `z`, in place, to the values at bias 0; larger ones saturate, ties go to the even multiple."""
    largest = largest_value(bits, mantissa)
    z.clamp_(-largest, largest)
    power = z.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=2)
    step = power.mul_(2.0**-mantissa)
    return z.div_(step).round_().mul_(step)


def offsets_of(loudest: Tensor, scale: Tensor, bits: int, mantissa: int) -> Tensor:
    """Return `k` `[in]` int8 for channels of these largest magnitudes under a bias `-log2(scale)`."""
    largest = largest_value(bits, mantissa)
    own = torch.where(loudest > TINY, largest / loudest.clamp_min(TINY), torch.inf).log2().round()
    return (own - (-scale.log2()).round()).clamp_(0, exponent_codes(bits, mantissa) - 1).to(torch.int8)
