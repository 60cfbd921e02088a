"""LLM-FP4's own 4-bit floats: a searched split into exponent and mantissa, and a real-valued bias per output channel.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, section 3, equations 5 to 9.
With E exponent bits and M mantissa bits, E + M = 3, a code is `sign << 3 | p << M | f` and means

    (-1)^sign * 2^-b * 2^p * (1 + f / 2^M)        p >= 1
    (-1)^sign * 2^-b * 2 * f / 2^M                p = 0, subnormal

All codes are finite. The bias b is any real number; `alpha = 2^-b` is what is stored, as the scale of a codebook whose
table is one of the three below. E1M2 is exactly the symmetric integer grid.

Differs from the paper: a weight that rounds to zero gets code 0, never 8, so that zero has one code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError
from compressor.formats.base import PackedTensor, QParams, grouped
from compressor.formats.codebook import Codebook, nearest

Grid = Literal["additive", "hybrid", "reference"]

POINTS = 100
"""Candidate biases besides the min-max one."""

_GAMMA_START, _GAMMA_STEP = 0.01, (1.2 - 0.01) / POINTS
_DELTA_START, _DELTA_STOP = -0.6, 2.0
_SMALLEST_ALPHA, _LARGEST_ALPHA = 2.0**-126, 2.0**120  # normal, and 128 times the largest is finite


def split_table(mantissa_bits: int) -> tuple[float, ...]:
    """Return the values of all 16 codes at b = 0 for 0 (E3M0), 1 (E2M1) or 2 (E1M2) mantissa bits; code 8 is -0."""
    steps = 1 << mantissa_bits
    magnitudes = []
    for index in range(8):
        p, f = divmod(index, steps)
        magnitudes.append(2.0 * f / steps if p == 0 else 2.0**p * (1 + f / steps))
    return (*magnitudes, *(-value for value in magnitudes))


SPLITS: dict[str, tuple[float, ...]] = {"e2m1": split_table(1), "e1m2": split_table(2), "e3m0": split_table(0)}
"""Table of every split, the one of min-max fitting first."""

_MANTISSA_BITS = {table[7]: bits for bits, table in ((bits, split_table(bits)) for bits in range(3))}


@dataclass(frozen=True)
class Float4(Codebook):
    """4-bit floats with one real scale per output channel; 4 bits per weight, 4 bytes per row, 64 per matrix.

    Attributes:
        grid: The biases a search tries. With `b` the min-max bias they are `b` itself, then 100 more:
            `additive`: `b + d`, `d` from -0.6 to 2 (clip ratios from 1.5 down to 1/4);
            `reference`: the paper's `g * b`, `g` from 0.01 to 1.1881, which depends on the weights' unit;
            `hybrid`: the paper's `g`, with steps of at least `g - 1` where `|b|` is below 1.
    """

    bits: int = field(default=4, init=False)
    group_size: int | None = field(default=None, init=False)
    table: tuple[float, ...] = field(default=SPLITS["e2m1"], init=False)
    grid: Grid = "additive"

    @property
    def name(self) -> str:
        """The name users type."""
        return "fp4"

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the codes of the paper's quantizer, uint8 `[out, in]`; see `round` for ties."""
        return nearest(self._unscaled(w, q), _codebook(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)` in one step, float32; scales may have further dimensions in front.

        Ties go to the even code, in E3M0 upwards: there 1.5 steps are halfway between two powers of two, and only the
        tie between 0 and the first goes down.
        """
        return self._unscaled(w, q).mul_(q.scale.unsqueeze(-1)).flatten(-2)

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the value at b = 0 nearest to every `z`; overwrites `z`. See `round` for ties."""
        largest = float(_codebook(q)[7])
        z = z.clamp_(-largest, largest)
        power = z.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=2)
        # A sum with 1.5 * 2**23 steps has no bits left below one step, so the addition itself rounds to even.
        large = power.mul_(1.5 * 2.0 ** (23 - _mantissa_bits(largest)))
        return z.add_(large).sub_(large)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        codes, q = super().unpack(packed)
        if tuple(_codebook(q).tolist()) not in SPLITS.values():
            raise CheckpointError(
                f"weight_codebook is not a table of {self.name} ({', '.join(SPLITS)})", "the checkpoint is damaged"
            )
        return codes, q

    def starts(self, w: Tensor, global_scale: Tensor | None = None) -> Iterator[QParams]:
        """Yield the min-max parameters of every split, E2M1 first."""
        assert global_scale is None, "fp4 has no global scale"
        for table in SPLITS.values():
            yield self.fit_table(w, table)

    def scale_candidates(self, q: QParams) -> Iterator[QParams]:
        """Yield `q`, then `q` with the bias of every row moved to the next point of the grid."""
        yield q
        bias = -q.scale.double().log2()  # [out, 1]
        for point in range(POINTS):
            alpha = torch.exp2(-self.moved(bias, point)).clamp_(_SMALLEST_ALPHA, _LARGEST_ALPHA)
            yield replace(q, scale=alpha.float())

    def moved(self, bias: Tensor, point: int) -> Tensor:
        """Return a point of the grid around the min-max biases, float64."""
        if self.grid == "additive":
            return bias + (_DELTA_START + point * (_DELTA_STOP - _DELTA_START) / (POINTS - 1))
        gamma = _GAMMA_START + point * _GAMMA_STEP
        if self.grid == "reference":
            return gamma * bias
        away = torch.where(bias < 0, -1.0, 1.0).double()
        return bias + (gamma - 1) * away * bias.abs().clamp(min=1)

    def _unscaled(self, w: Tensor, q: QParams) -> Tensor:
        """Return the value at b = 0 every weight rounds to, float32 `[..., out, 1, in]`; zeros are +0.

        With `z = w / alpha` that is the multiple of `v = 2^(max(floor(log2 |z|), 1) - M)` next to z, ties to the even
        one.
        """
        return self.snap(grouped(w.float(), self.group_size) / q.scale.unsqueeze(-1), q)


def _mantissa_bits(largest: float) -> int:
    """Return the mantissa bits of the split whose largest value is given."""
    if largest not in _MANTISSA_BITS:
        raise NumericalError(
            f"a table that ends at {largest:g} is none of fp4's", f"use the tables of float4.py: {', '.join(SPLITS)}"
        )
    return _MANTISSA_BITS[largest]


def _codebook(q: QParams) -> Tensor:
    assert q.codebook is not None, "fp4 parameters carry a table"
    return q.codebook
