"""E8M0, the shared scale of the MX formats: a byte that is a bare exponent, `2**(byte - 127)`.

OCP Microscaling Formats (MX) Specification 1.0. Byte 255 means NaN and is never written.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_e8m0(absmax: Tensor, offset: int, largest: int) -> Tensor:
    """Return the bytes that send largest magnitudes into `[1.75 * 2**(offset-1), 1.75 * 2**offset)`, uint8.

    Args:
        absmax: Largest magnitude of every group, finite float32, any shape; zeros give byte 0.
        offset: Exponent of the largest element value: 2 for E2M1, 8 for E4M3.
        largest: Largest byte to return: the largest element value times its scale must be finite in float32.
    """
    # A quarter of the mantissa range added to the bits carries into the exponent exactly from 1.75 on.
    exponent = (absmax.view(torch.int32) + (1 << 21)) >> 23
    return (exponent - offset).clamp_(0, largest).to(torch.uint8)


def decode_e8m0(scale: Tensor) -> Tensor:
    """Return the float32 values of bytes up to 254, same shape; exact."""
    byte = scale.to(torch.int32)
    # The byte is float32's own exponent field; only 2**-127 (byte 0) is subnormal and sits in the mantissa.
    return torch.where(byte == 0, 1 << 22, byte << 23).view(torch.float32)
