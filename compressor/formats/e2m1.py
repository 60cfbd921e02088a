"""E2M1, the 4-bit float of NVFP4 and MXFP4: one sign, two exponent and one mantissa bit.

OCP Microscaling Formats (MX) Specification 1.0. Codes 0-7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_REACH = 7.0
"""Half of the last step beyond the largest value."""

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PLACES = 0x8E00 - 0x10000  # the sign, two bits of the exponent and one of the mantissa, as int16
E2M1_VALUES = (*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES))
"""Value of each code; code 8 is -0."""


def encode_e2m1(z: Tensor) -> Tensor:
    """Return the nearest codes of finite float32 `z`: uint8, same shape; ties to the even code, saturating at +-6.

    +0 and -0 give code 0. A negative value that rounds to zero keeps its sign and gives code 8, which also means zero;
    compressed-tensors packs it the same way.
    """
    magnitude = z.abs()
    # Steps are 1/2 up to 2, 1 up to 4 and 2 up to 6. Inside each range the code grows by one per step and its parity
    # is that of the rounded multiple, so rounding half to even there is rounding to the even code.
    codes = (magnitude * 2).clamp_(max=4).round_()  # 0..4
    codes += magnitude.clamp(2, 4).round_()  # 2..4
    codes += magnitude.mul_(0.5).clamp_(2, 3).round_()  # 2..3
    return codes.sub_(4).to(torch.uint8).bitwise_or_((z < 0).to(torch.uint8) << 3)


def round_e2m1(z: Tensor) -> Tensor:
    """Round float32 `z`, in place, to the values its codes mean, without making codes; what rounds to zero gives +0."""
    z.clamp_(-E2M1_MAX, E2M1_MAX)
    # Half the power of two below |z| is the step, never less than 1/2. A sum with 1.5 * 2**23 steps has no bits left
    # below one step, so the addition itself rounds to the even multiple, as in `encode_e2m1`.
    power = z.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=1)
    large = power.mul_(1.5 * 2**22)
    return z.add_(large).sub_(large)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the float32 values of uint8 codes 0-15, same shape."""
    # The code's bits at their places in a float16, whose exponents count from 15 where E2M1's count from 1: several
    # times faster than a table.
    wide = codes.to(torch.int16)
    bits = (wide << 12).bitwise_or_(wide << 9).bitwise_and_(_PLACES)
    return bits.view(torch.float16).float().mul_(2.0**14)
