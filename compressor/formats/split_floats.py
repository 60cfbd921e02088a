"""LLM-FP4's own floats of 4, 6 or 8 bits: a split into exponent and mantissa per layer, a real bias per output channel.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, section 3, equations 5 to 9.
With E exponent bits and M mantissa bits, E + M + 1 = bits, a code is `sign << (bits - 1) | p << M | f` and means

    (-1)^sign * 2^-b * 2^p * (1 + f / 2^M)        p >= 1
    (-1)^sign * 2^-b * 2 * f / 2^M                p = 0, subnormal

All codes are finite. The bias b is any real number; `alpha = 2^-b` is what is stored, as the scale of a codebook whose
table follows from the split. E1Mx is exactly the symmetric integer grid.

`float4.py` stores 4 bits as nibbles with their table. Here 6 and 8 bits are stored, in native checkpoints only: codes
in a dense bit stream, `weight_scale`, and `weight_mantissa` (M), from which reader and writer make the same table.

Differs from the paper: a weight that rounds to zero gets code 0, never that of -0, so that zero has one code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QParams, Slot, group_absmax, grouped, require_layout
from compressor.formats.bitstream import pack_bits, packed_words, unpack_bits
from compressor.formats.codebook import TINY, Codebook, nearest, refuse_table
from compressor.formats.small_floats import SPLITS, largest_value

Grid = Literal["additive", "hybrid", "reference"]

POINTS = 100
"""Candidate biases besides the min-max one."""

_GAMMA_START, _GAMMA_STEP = 0.01, (1.2 - 0.01) / POINTS
_DELTA_START, _DELTA_STOP = -0.6, 2.0
_SMALLEST_ALPHA, _LARGEST_VALUE = 2.0**-126, 2.0**127  # normal, and the largest value is finite


@lru_cache(maxsize=32)
def float_table(bits: int, mantissa: int) -> tuple[float, ...]:
    """Return the values of all codes at b = 0, those with the sign bit behind the others; the first of them is -0."""
    steps = 1 << mantissa
    magnitudes = []
    for index in range(1 << (bits - 1)):
        p, f = divmod(index, steps)
        magnitudes.append(2.0 * f / steps if p == 0 else 2.0**p * (1 + f / steps))
    return (*magnitudes, *(-value for value in magnitudes))


def split_name(bits: int, mantissa: int) -> str:
    """Return what a split is called: `e2m3`."""
    return f"e{bits - 1 - mantissa}m{mantissa}"


@dataclass(frozen=True)
class SplitFloat(Codebook):
    """Floats with one real scale per output channel; what does not depend on how codes are stored.

    Attributes:
        grid: The biases a search tries. With `b` the min-max bias they are `b` itself, then 100 more:
            `additive`: `b + d`, `d` from -0.6 to 2 (clip ratios from 1.5 down to 1/4);
            `reference`: the paper's `g * b`, `g` from 0.01 to 1.1881, which depends on the weights' unit;
            `hybrid`: the paper's `g`, with steps of at least `g - 1` where `|b|` is below 1.
    """

    group_size: int | None = field(default=None, init=False)
    table: tuple[float, ...] = field(default=(), init=False)
    grid: Grid = "additive"

    def __post_init__(self) -> None:
        if self.bits not in SPLITS:
            raise UnsupportedError(f"LLM-FP4 floats of {self.bits} bits", f"choose {', '.join(map(str, SPLITS))} bits")
        assert refuse_table(self.values, self.bits) is None, self

    @property
    def values(self) -> tuple[float, ...]:
        """The table `fit` uses."""
        return float_table(self.bits, SPLITS[self.bits][0])

    def fit_table(self, w: Tensor, table: tuple[float, ...]) -> QParams:
        """Return min-max scales for a table; rows whose scale would not be a normal float32 count as zero."""
        absmax = group_absmax(w, self.group_size)  # [out, 1]
        scale = absmax / max(table)
        scale = torch.where((absmax < TINY) | (scale < _SMALLEST_ALPHA), torch.ones_like(scale), scale)
        return QParams(scale, codebook=torch.tensor(table, dtype=torch.float32, device=w.device))

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the codes of the paper's quantizer, uint8 `[out, in]`; see `round` for ties."""
        return nearest(self._unscaled(w, q), table_of(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)` in one step, float32; scales may have further dimensions in front.

        Ties go to the even code; without mantissa bits upwards: there 1.5 steps are halfway between two powers of two,
        and only the tie between 0 and the first goes down.
        """
        return self._unscaled(w, q).mul_(q.scale.unsqueeze(-1)).flatten(-2)

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the value at b = 0 nearest to every `z`; overwrites `z`. See `round` for ties."""
        mantissa = self.mantissa(q)
        largest = largest_value(self.bits, mantissa)
        z = z.clamp_(-largest, largest)
        power = z.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=2)
        # A sum with 1.5 * 2**23 steps has no bits left below one step, so the addition itself rounds to even.
        large = power.mul_(1.5 * 2.0 ** (23 - mantissa))
        return z.add_(large).sub_(large)

    def mantissa(self, q: QParams) -> int:
        """Return the mantissa bits of the split whose table the parameters carry."""
        largest = float(table_of(q)[(1 << (self.bits - 1)) - 1])
        for mantissa in SPLITS[self.bits]:
            if largest == largest_value(self.bits, mantissa):
                return mantissa
        known = ", ".join(split_name(self.bits, m) for m in SPLITS[self.bits])
        raise NumericalError(f"a table that ends at {largest:g} is none of {self.name}'s", f"use those of {known}")

    def starts(self, w: Tensor, global_scale: Tensor | None = None) -> Iterator[QParams]:
        """Yield the min-max parameters of every split, that of `fit` first."""
        assert global_scale is None, f"{self.name} has no global scale"
        for mantissa in SPLITS[self.bits]:
            yield self.fit_table(w, float_table(self.bits, mantissa))

    def scale_candidates(self, q: QParams) -> Iterator[QParams]:
        """Yield `q`, then `q` with the bias of every row moved to the next point of the grid."""
        yield q
        bias = -q.scale.double().log2()  # [out, 1]
        top = _LARGEST_VALUE / max(largest_value(self.bits, mantissa) for mantissa in SPLITS[self.bits])
        for point in range(POINTS):
            alpha = torch.exp2(-self.moved(bias, point)).clamp_(_SMALLEST_ALPHA, top)
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


@dataclass(frozen=True)
class WideFloat(SplitFloat):
    """Floats of 6 or 8 bits; so many bits per weight, and 4 bytes per row."""

    def __post_init__(self) -> None:
        if self.bits not in (6, 8):
            raise UnsupportedError(f"{self.bits} bits in a stream", "choose 6 or 8; 4 bits are stored by format fp4")
        super().__post_init__()

    @property
    def name(self) -> str:
        """The name users type."""
        return "fp6" if self.bits == 6 else "fp8-searched"

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        return {
            "weight_packed": Slot(torch.int32, (rows, packed_words(columns, self.bits))),
            "weight_scale": Slot(torch.float32, (rows, 1)),
            "weight_mantissa": Slot(torch.uint8, (1,)),
            "weight_shape": Slot(torch.int64, (2,)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk.

        Raises:
            NumericalError: A code does not fit in `bits` bits.
        """
        tensors = {
            "weight_packed": pack_bits(codes, self.bits),
            "weight_scale": q.scale.contiguous(),
            "weight_mantissa": torch.tensor([self.mantissa(q)], dtype=torch.uint8, device=codes.device),
            "weight_shape": torch.tensor(codes.shape, device=codes.device),
        }
        return PackedTensor(self.name, (codes.shape[0], codes.shape[1]), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        mantissa = int(packed.tensors["weight_mantissa"])
        if mantissa not in SPLITS[self.bits]:
            raise CheckpointError(
                f"weight_mantissa of {self.name} is {mantissa}, not one of {sorted(SPLITS[self.bits])}",
                "the checkpoint is damaged",
            )
        scale = packed.tensors["weight_scale"]
        table = torch.tensor(float_table(self.bits, mantissa), dtype=torch.float32, device=scale.device)
        return unpack_bits(packed.tensors["weight_packed"], self.bits, packed.shape[1]), QParams(scale, codebook=table)


def table_of(q: QParams) -> Tensor:
    """Return the table that the parameters of such floats carry."""
    assert q.codebook is not None, "parameters of floats carry a table"
    return q.codebook
