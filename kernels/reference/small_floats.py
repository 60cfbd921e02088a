"""Products of LLM-FP4's floats on integers alone: what packed codes multiply to, exactly.

Liu et al. 2023, arXiv 2310.16836, section 4, equations 18 and 19. With weights `alpha_w[o] V(w)`, inputs rounded to
`alpha_x V(x)` and channel j of them shifted by `2^k_j` before rounding, a layer computes

    y[t, o] = alpha_x alpha_w[o] sum_j V(x_tj) V(w_oj) 2^-k_j

All values of a split with M mantissa bits are whole multiples of `2^(1 - M)`: `f` below the first binade and
`2^(p - 1) (2^M + f)` above. So every product, attached to its column's `2^(kmax - k_j)`, is an integer, and so is the
sum: no order of summation, no number of threads changes it. Only the scales in front round, once each.

`tops` says how wide these integers are. For 4-bit floats, inputs in E2M1 and weights in E2M1 or E1M2 fit int8 with the
shift attached (at most 12 and 96), and int32 sums hold a million of their products. In float32 a product of such
matrices is exact while sums stay below `2^24`, which is how this oracle for kernels computes it (`exact_in_float32`).

The packed path of `compressor.load` multiplies the same numbers as floats, as whatever ran the model while it was
compressed did. Both agree to float32's rounding, and bit for bit where the scales are powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats.base import PackedTensor
from compressor.formats.split_floats import SplitFloat
from compressor.inputs import RoundFloat

_FLOAT32 = 2**24
_INT64 = 2**63 - 1


def unit(mantissa: int) -> float:
    """Return the value at bias 0 that all others are whole multiples of."""
    return 2.0 ** (1 - mantissa)


def whole_table(bits: int, mantissa: int) -> Tensor:
    """Return what every code means in multiples of `unit`, int64 `[2**bits]`; the code of -0 means 0."""
    index = torch.arange(1 << (bits - 1))
    p, f = index >> mantissa, index & ((1 << mantissa) - 1)
    magnitudes = torch.where(p == 0, f, ((1 << mantissa) + f) << (p - 1).clamp_min(0))
    return torch.cat([magnitudes, -magnitudes])


def input_integers(x: Tensor, op: RoundFloat) -> Tensor:
    """Return rounded inputs in multiples of `scale * unit * 2^-k`, int64 in the shape of `x` `[..., in]`."""
    z = torch.ldexp(x.float(), op.k.to(torch.int32)) / op.scale
    return (op.snap(z).double() / unit(int(op.mantissa))).long()


def weight_integers(packed: PackedTensor, fmt: SplitFloat, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return packed weights with their columns' shifts attached, as integers.

    Args:
        packed: The weight.
        fmt: Its format.
        k: `[in]`, what channels of the inputs are shifted by.

    Returns:
        int64 `[out, in]`; what one of them is worth at `kmax = 0`, float32 `[out, 1]`; and `kmax`, the largest shift.

    Raises:
        NumericalError: They may not fit 64 bits.
    """
    codes, q = fmt.unpack(packed)
    mantissa, most = fmt.mantissa(q), int(k.max())
    _refuse_wide(tops(fmt.bits, mantissa, most), 1, 1)
    table = whole_table(fmt.bits, mantissa).to(codes.device)
    return table[codes.long()] << (most - k.long()), q.scale * unit(mantissa), most


def float_linear(x: Tensor, packed: PackedTensor, fmt: SplitFloat, op: RoundFloat) -> Tensor:
    """Return `round(x) @ weight.T`, float32 `[..., out]`, by exact integers and three factors.

    Args:
        x: `[..., in]`.
        packed: The weight.
        fmt: Its format.
        op: How inputs are rounded.

    Raises:
        NumericalError: A sum may not fit 64 bits: splits with many exponents make very large integers.
    """
    weights, worth, most = weight_integers(packed, fmt, op.k)
    inputs = input_integers(x, op)
    largest = tops(op.bits, int(op.mantissa)), int(weights.abs().max())
    _refuse_wide(*largest, x.shape[-1])
    if exact_in_float32(*largest, x.shape[-1]):
        total = inputs.float() @ weights.float().T
    else:
        total = (inputs @ weights.T).float()
    # Units and shifts are powers of two and exact: the two real scales are all that rounds.
    return total * (op.scale.float() * worth.squeeze(-1) * (unit(int(op.mantissa)) * 2.0**-most))


def tops(bits: int, mantissa: int, offsets: int = 0) -> int:
    """Return the largest integer that a code can mean, shifted by at most `offsets`."""
    return int(whole_table(bits, mantissa).max()) << offsets


def exact_in_float32(x: int, w: int, in_features: int) -> bool:
    """Return whether sums of so many products of integers up to `x` and `w` are exact in float32, in any order."""
    return x * w * in_features <= _FLOAT32


def _refuse_wide(x: int, w: int, count: int) -> None:
    if x * w * count > _INT64:
        raise NumericalError(
            f"{count} products of integers up to {x:,} x {w:,} may overflow 64 bits",
            "use the float path: the splits at hand span too many powers of two",
        )
