"""E4M3, the 8-bit float of the FP8 formats: one sign, four exponent and three mantissa bits, no infinities.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433. A code is the number's bit pattern, so
bit 7 is the sign, code 0x7E is 448, and 0x7F and 0xFF are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError

E4M3_MAX = 448.0
E4M3_NAN_CODES = (0x7F, 0xFF)


def encode_e4m3(z: Tensor) -> Tensor:
    """Return the nearest codes of finite float32 `z`, which is overwritten: uint8, same shape.

    Ties go to the even code, and magnitudes above 448 saturate, so that no code is NaN. +0 and -0 give code 0; a
    negative value that rounds to zero keeps its sign, as in compressed-tensors.
    """
    z.clamp_(-E4M3_MAX, E4M3_MAX).add_(0.0)  # the sum turns -0 into +0
    return z.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Return the float32 values of uint8 codes, same shape."""
    if codes.device.type != "cpu" or not codes.numel() or int((codes & 0x7F).max()) == 0x7F:
        return codes.view(torch.float8_e4m3fn).float()
    # The code's bits at their places in a float16, whose exponents count from 15 where E4M3's count from 7: on a CPU
    # that is several times faster, but it does not know E4M3's NaN.
    wide = codes.to(torch.int16)
    sign = (wide << 8).bitwise_and_(-0x8000)
    bits = wide.bitwise_left_shift_(7).bitwise_and_(0x3F80).bitwise_or_(sign)
    return bits.view(torch.float16).float().mul_(2.0**8)


def e4m3_weight(codes: Tensor) -> Tensor:
    """Return uint8 codes as the float8_e4m3fn tensor that lies on disk; shares memory if `codes` is contiguous.

    Raises:
        NumericalError: A code means NaN.
    """
    bad = int(((codes & 0x7F) == 0x7F).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {codes.numel()} codes mean NaN in E4M3",
            "the method that chose the codes is at fault: encode with the same format that packs",
        )
    return codes.contiguous().view(torch.float8_e4m3fn)
