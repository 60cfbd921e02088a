"""The precision of a block's matrix products while it is calibrated or learned."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

FEW_BITS = 4
"""Up to these many, rounding weights does far more to a product than computing it in bfloat16."""


def products(device: torch.device, bits: int) -> AbstractContextManager[None]:
    """Return the context for running a block whose widest compressed weight has `bits` bits.

    bfloat16 products, with everything between them in float32, where the device computes them natively and the bits
    are few; float32 otherwise.
    """
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16) if fast and bits <= FEW_BITS else nullcontext()
