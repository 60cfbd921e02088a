"""Signed powers: a non-uniform grid with one exponent per matrix, of 2 to 8 bits.

Yvinec et al. 2023, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", arXiv 2308.05600, and its
predecessor PowerQuant, arXiv 2301.09858. With `Q = 2**(bits-1) - 1` and an exponent `a` from 0.1 to 1, the integers
-Q to Q mean

    w = scale * sign(c) * |c|**(1/a)

so that small weights lie closer together the smaller `a` is; `a = 1` is a symmetric integer grid. A code is
`sign << (bits-1) | |c|`. On disk, in native checkpoints only: codes in a dense bit stream, scales in the checkpoint's
dtype, and `a` as one float32, from which reader and writer make the same table.

Differs from the papers: a weight goes to the value nearest to it, not to the one whose power is nearest, which never
has the smaller error. The unit of the scale is the smallest step instead of the largest value, so that `a = 1/n` gives
integers times a scale (see `as_integers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from functools import lru_cache

import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QParams, Slot, group_absmax, grouped, n_groups, require_layout
from compressor.formats.bitstream import pack_bits, packed_words, unpack_bits
from compressor.formats.codebook import TINY, Codebook
from compressor.formats.ints import IntFormat

SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.1, 1.0
"""Below, 4 bits are far worse than integers; above 1, values crowd at the far end and the slope at zero is infinite."""

DEFAULT_EXPONENT = 0.5
"""What `fit` uses: squares, which suit bell-shaped weights and are integers."""

_EXACT = Context(prec=40)


@dataclass(frozen=True)
class Power(Codebook):
    """Powers of integers times a scale.

    Attributes:
        bits: Bits of one code, 2 to 8.
        group_size: Consecutive inputs that share one scale; None for one scale per output channel, or per matrix.
        dtype: Dtype of the stored scales, bfloat16 or float32.
        per_tensor: Whether one scale covers the whole matrix.
        exponent: The one `fit` uses; None for `DEFAULT_EXPONENT`, which methods that search take for leave to do so.
            What is decoded goes by the one in the parameters.
    """

    table: tuple[float, ...] = field(default=(), init=False)
    dtype: torch.dtype = torch.bfloat16
    per_tensor: bool = False
    exponent: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UnsupportedError(f"powers of {self.bits} bits", "choose 2 to 8 bits")
        if self.group_size is not None and (self.group_size < 1 or self.per_tensor):
            raise UnsupportedError(f"group size {self.group_size}", "choose a positive one, or one scale per matrix")
        if self.dtype not in (torch.bfloat16, torch.float32):
            # Steps near zero are up to Q**10 times smaller than the largest weight: float16 has no room for them.
            raise UnsupportedError(f"{self.name} scales of dtype {self.dtype}", "store bfloat16 or float32 scales")
        if not SMALLEST_EXPONENT <= self.fitted_exponent <= LARGEST_EXPONENT:
            raise UnsupportedError(
                f"exponent {self.exponent:g}", f"choose one from {SMALLEST_EXPONENT:g} to {LARGEST_EXPONENT:g}"
            )

    @property
    def name(self) -> str:
        """The name users type."""
        return f"power{self.bits}"

    @property
    def fitted_exponent(self) -> float:
        """The exponent `fit` uses."""
        return DEFAULT_EXPONENT if self.exponent is None else self.exponent

    @property
    def largest_code(self) -> int:
        """Q, the largest magnitude of a code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def values(self) -> tuple[float, ...]:
        """The table `fit` uses."""
        return powers(self.bits, stored_exponent(self.fitted_exponent))

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max scales, `[out, groups]` or `[1]`, for this format's exponent.

        Groups of zeros, and of magnitudes below `TINY`, get scale 1 and decode to zero.

        Raises:
            NumericalError: `w` holds NaN or Inf, or weights too large for the dtype of scales.
        """
        assert global_scale is None, "powers have no global scale"
        return self.params(self.absmax(w), self.fitted_exponent)

    def absmax(self, w: Tensor) -> Tensor:
        """Return what min-max scales cover: the largest magnitude of every group, float32 in the shape of scales."""
        absmax = group_absmax(w, self.group_size)  # [out, groups]
        return absmax.amax().reshape(1) if self.per_tensor else absmax

    def params(self, largest: Tensor, exponent: float) -> QParams:
        """Return the parameters of a grid with an exponent whose largest values are as near to `largest` as storable.

        Args:
            largest: float32, `[out, groups]` or `[1]`; below `TINY` the scale is 1.
            exponent: Rounded to float32.

        Raises:
            NumericalError: A value is too large for the dtype of scales.
        """
        reach = powers(self.bits, stored_exponent(exponent))[self.largest_code]
        return self._stored(torch.where(largest < TINY, torch.ones_like(largest), largest / reach), exponent)

    def moved(self, q: QParams, exponent: float, factor: Tensor) -> QParams:
        """Return the grid with another exponent whose largest values are those of `q` times `factor`.

        Args:
            q: The grid.
            exponent: Rounded to float32; with that of `q` and a factor of 1, scales stay what they are bit for bit.
            factor: float32, positive, in the shape of the scales.

        Raises:
            NumericalError: A value is too large for the dtype of scales.
        """
        assert q.exponent is not None, "power parameters carry their exponent"
        before = powers(self.bits, float(q.exponent))[self.largest_code]
        after = powers(self.bits, stored_exponent(exponent))[self.largest_code]
        return self._stored(q.scale.float() * factor * (before / after), exponent)

    def _stored(self, exact: Tensor, exponent: float) -> QParams:
        """Return parameters in stored precision."""
        exponent = stored_exponent(exponent)
        table = powers(self.bits, exponent)
        scale = exact.to(self.dtype)
        scale = torch.where(scale.float() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        if not torch.isfinite(scale.float() * table[self.largest_code]).all():
            raise NumericalError(
                f"weights of magnitude {float(exact.max()) * table[self.largest_code]:.3g} overflow {self.name} with "
                f"{self.dtype} scales",
                "keep this layer as it is with --skip",
            )
        return QParams(
            scale,
            codebook=torch.tensor(table, dtype=torch.float32, device=exact.device),
            exponent=torch.tensor([exponent], dtype=torch.float32, device=exact.device),
        )

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the codes of the nearest values, uint8 `[out, in]`, in float32; ties go to even codes."""
        z = grouped(w.float(), self.group_size) / self.steps(q)
        return self.signed_codes(torch.copysign(self._nearest(z, q).float(), z)).flatten(-2)

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the value at scale 1 nearest to every `z`."""
        assert q.codebook is not None, "power parameters carry their table"
        return torch.copysign(looked_up(q.codebook, self._nearest(z, q)), z)

    def _nearest(self, z: Tensor, q: QParams) -> Tensor:
        """Return the magnitudes of the nearest codes, int32 in the shape of `z`: of `|z|**a`, the floor or the next.

        A few times faster than a search in a table. It does not matter if a power is off by a rounding error: a value
        that close to a code is not close to the limit on either side of it.
        """
        assert q.codebook is not None, "power parameters carry their table"
        assert q.exponent is not None, "power parameters carry their exponent"
        magnitudes = q.codebook[: self.largest_code + 1].double()
        limits = ((magnitudes[:-1] + magnitudes[1:]) / 2).float()  # [Q]
        # A value on a limit goes down; above an odd code, where the next one is even, the limit lies just below itself.
        limits[1::2] = torch.nextafter(limits[1::2], torch.zeros_like(limits[1::2]))
        size = z.abs()
        power = size.pow(float(q.exponent)).nan_to_num_(nan=0.0)
        below = power.clamp_(max=self.largest_code - 1).to(torch.int32)
        return below.add_(size > looked_up(limits, below))

    def encode_powers(self, w: Tensor, q: QParams) -> Tensor:
        """Return the codes of the papers' quantizer, uint8 `[out, in]`: `|w / scale|**a` rounded, ties to even.

        That is the value whose power is nearest; `encode` finds the value that is nearest itself.
        """
        assert q.exponent is not None, "power parameters carry their exponent"
        z = grouped(w.float(), self.group_size) / self.steps(q)
        magnitude = z.abs().pow_(float(q.exponent)).round_().clamp_(max=self.largest_code)
        return self.signed_codes(torch.copysign(magnitude, z)).flatten(-2)

    def signed_codes(self, c: Tensor) -> Tensor:
        """Return the codes of whole numbers from -Q to Q, float of any shape -> uint8."""
        magnitude = c.abs().to(torch.uint8)
        return torch.where(c < 0, magnitude + self.largest_code + 1, magnitude)

    def integers(self, codes: Tensor) -> Tensor:
        """Return the whole numbers from -Q to Q that codes stand for, int16 of the same shape."""
        magnitude = (codes & self.largest_code).to(torch.int16)
        return torch.where(codes > self.largest_code, -magnitude, magnitude)

    def steps(self, q: QParams) -> Tensor:
        """Return the scales, float32 `[out, groups, 1]`, or `[1, 1, 1]` for one in all."""
        wide = q.scale.to(torch.float32, copy=True)
        return wide.reshape(1, 1, 1) if self.per_tensor else wide.unsqueeze(-1)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q` with `steps`, shaped as `steps(q)`, in the dtype scales are stored in; the exponent stays."""
        return replace(q, scale=steps.reshape(q.scale.shape).to(self.dtype))

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        scales = (1,) if self.per_tensor else (rows, n_groups(columns, self.group_size))
        return {
            "weight_packed": Slot(torch.int32, (rows, packed_words(columns, self.bits))),
            "weight_scale": Slot(self.dtype, scales),
            "weight_exponent": Slot(torch.float32, (1,)),
            "weight_shape": Slot(torch.int64, (2,)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk.

        Raises:
            NumericalError: A code does not fit in `bits` bits.
        """
        assert q.exponent is not None, "power parameters carry their exponent"
        rows, columns = codes.shape
        tensors = {
            "weight_packed": pack_bits(codes, self.bits),
            "weight_scale": q.scale.contiguous(),
            "weight_exponent": q.exponent.clone(),
            "weight_shape": torch.tensor((rows, columns), device=codes.device),
        }
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        exponent = float(packed.tensors["weight_exponent"])
        if not stored_exponent(SMALLEST_EXPONENT) <= exponent <= LARGEST_EXPONENT:
            raise CheckpointError(
                f"weight_exponent of {self.name} is {exponent:g}, not from {SMALLEST_EXPONENT:g} to "
                f"{LARGEST_EXPONENT:g}",
                "the checkpoint is damaged",
            )
        scale = packed.tensors["weight_scale"]
        codebook = torch.tensor(powers(self.bits, exponent), dtype=torch.float32, device=scale.device)
        codes = unpack_bits(packed.tensors["weight_packed"], self.bits, packed.shape[1])
        return codes, QParams(scale, codebook=codebook, exponent=packed.tensors["weight_exponent"])


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Return `table[index]` for one table `[n]` and int32 indices of any shape; the fastest way to do so."""
    return table.index_select(0, index.flatten()).view(index.shape)


def stored_exponent(exponent: float) -> float:
    """Return the float32 value nearest to an exponent: what lies on disk."""
    return float(torch.tensor(exponent, dtype=torch.float32))


@lru_cache(maxsize=4096)
def powers(bits: int, exponent: float) -> tuple[float, ...]:
    """Return what every code of `bits` bits means at scale 1, float32: 0, 1, 2**(1/a), ..., then the same negated.

    Computed in decimals, which give the same digits on every machine; `pow` of floats does not.

    Args:
        bits: 2 to 8.
        exponent: `a`, a float32 value; the one nearest to `1/n` counts as exactly that.
    """
    n = whole_power(exponent)
    power = Decimal(n) if n else _EXACT.divide(Decimal(1), Decimal(exponent))
    exact = [Decimal(0), *(_EXACT.power(Decimal(i), power) for i in range(1, 1 << (bits - 1)))]
    magnitudes = [float(value) for value in torch.tensor([float(value) for value in exact], dtype=torch.float32)]
    return (*magnitudes, *(-value for value in magnitudes))


def whole_power(exponent: float) -> int | None:
    """Return n if a float32 exponent is the nearest one to `1/n`, else None."""
    n = round(1 / exponent)
    return n if stored_exponent(1 / n) == exponent else None


def largest_integer(bits: int, exponent: float) -> int | None:
    """Return the largest value at scale 1, `Q**n`, if all values are integers (exponent `1/n`), else None."""
    n = whole_power(stored_exponent(exponent))
    return None if n is None else ((1 << (bits - 1)) - 1) ** n


def as_integers(codes: Tensor, q: QParams, fmt: IntFormat) -> tuple[Tensor, QParams]:
    """Return the same weights as codes and parameters of an integer format; decoded, they are equal bit for bit.

    With exponent 1/2 a code `c` becomes the integer `c * |c|`: at most 49 with 4 bits. Scales are taken over.

    Args:
        codes: uint8 `[out, in]`.
        q: Power parameters.
        fmt: Symmetric, with the groups and the scale dtype of `q`.

    Raises:
        UnsupportedError: The values are no integers, or too large for the format.
    """
    assert q.codebook is not None, "power parameters carry their table"
    assert q.exponent is not None, "power parameters carry their exponent"
    assert fmt.symmetric, "powers are symmetric"
    assert fmt.dtype == q.scale.dtype, "scales of another dtype would not be equal bit for bit"
    largest = float(q.codebook.max())
    if whole_power(float(q.exponent)) is None or largest > fmt.zero_code - 1:
        raise UnsupportedError(
            f"exponent {float(q.exponent):g} gives values up to {largest:g}, which {fmt.name} does not store",
            "use exponent 0.5 with 4 bits or fewer, and int7 or int8",
        )
    integers = q.codebook.to(torch.int16).add_(fmt.zero_code).to(torch.uint8)
    return integers[codes.int()], QParams(q.scale)
