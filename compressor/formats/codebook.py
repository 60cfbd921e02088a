"""Codes of up to 4 bits that index a table of values: any grid of 16 points, one table per matrix.

The way to store what no standard container has a name for: other small floats, power-law grids, learned tables. On
disk, in native checkpoints only: `w = weight_scale * weight_codebook[code]`, two codes per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError, UnsupportedError
from compressor.formats.base import (
    PackedTensor,
    QParams,
    Slot,
    group_absmax,
    grouped,
    n_groups,
    refuse_matrix,
    require_layout,
)
from compressor.formats.bitstream import pack_nibbles, unpack_nibbles

ENTRIES = 16
"""Entries of a stored table; one of fewer bits is filled up with zeros, so that every nibble stays inside."""

TINY = 1e-30
"""Largest magnitudes below this count as zero: no scale made from them can be trusted in float32."""


def uniform(bits: int) -> tuple[float, ...]:
    """Return the table of symmetric integers of `bits` bits, as sign and magnitude: 0, 1, ..., -0, -1, ..."""
    magnitudes = [float(value) for value in range(1 << (bits - 1))]
    return (*magnitudes, *(-value for value in magnitudes))


@dataclass(frozen=True)
class Codebook:
    """Table look-ups with float32 scales; 4 bits per weight, 64 bytes per matrix and the scales.

    A method may put any other table into `QParams.codebook`; `table` is the one `fit` uses.

    Attributes:
        bits: Bits of one code, 2 to 4. Codes are stored in 4 bits whatever their width.
        group_size: Consecutive inputs that share one scale; None for one scale per output channel.
        table: `2**bits` finite values, in any order, with 0 and both signs among them; empty for `uniform(bits)`.
    """

    bits: int
    group_size: int | None
    table: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise UnsupportedError(f"a codebook of {self.bits} bits", "choose 2 to 4 bits")
        if self.group_size is not None and self.group_size < 1:
            raise UnsupportedError(f"group size {self.group_size}", "choose a positive one, or None for whole rows")
        reason = refuse_table(self.values, self.bits)
        if reason:
            raise UnsupportedError(f"codebook of {self.bits} bits: {reason}", "give another table")

    @property
    def name(self) -> str:
        """The name users type."""
        return f"codebook{self.bits}"

    @property
    def has_global_scale(self) -> bool:
        """False: scales are float32 and need none."""
        return False

    @property
    def mirrors(self) -> bool:
        """False: tables are symmetric."""
        return False

    @property
    def container(self) -> None:
        """None: no compressed-tensors format stores tables."""
        return None

    @property
    def values(self) -> tuple[float, ...]:
        """The table `fit` uses."""
        return self.table or uniform(self.bits)

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None."""
        return refuse_matrix(shape, self.group_size)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return this format's table and scales `[out, groups]` under which it covers every weight.

        Groups of zeros, and of magnitudes below `TINY`, get scale 1 and decode to zero.

        Raises:
            NumericalError: `w` holds NaN or Inf.
        """
        assert global_scale is None, "codebooks have no global scale"
        return self.fit_table(w, self.values)

    def fit_table(self, w: Tensor, table: tuple[float, ...]) -> QParams:
        """Return min-max scales for a table; see `fit`."""
        absmax = group_absmax(w, self.group_size)  # [out, groups]
        reach = min(max(table), -min(table))
        scale = torch.where(absmax < TINY, torch.ones_like(absmax), absmax / reach)
        return QParams(scale, codebook=torch.tensor(table, dtype=torch.float32, device=w.device))

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32; see `nearest`."""
        return nearest(grouped(w.float(), self.group_size) / self.steps(q), _table(q)).flatten(-2)

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `scale * codebook[code]`, float32 `[out, in]`."""
        values = grouped(_table(q)[codes.int()], self.group_size)
        return values.mul_(self.steps(q)).flatten(-2)

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)`, float32."""
        steps = self.steps(q)
        return self.snap(grouped(w.float(), self.group_size) / steps, q).mul_(steps).flatten(-2)

    def steps(self, q: QParams) -> Tensor:
        """Return the scales, float32 `[out, groups, 1]`."""
        return q.scale.unsqueeze(-1)

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q` with scales `steps` `[out, groups, 1]`."""
        return replace(q, scale=steps.squeeze(-1))

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the entry nearest to every `z`."""
        table = _table(q)
        return table[nearest(z, table).int()]

    def reach(self, q: QParams) -> tuple[float, float]:
        """Return half of the last step beyond the smallest and the largest entry."""
        values = _table(q).unique()  # sorted
        return float(1.5 * values[0] - 0.5 * values[1]), float(1.5 * values[-1] - 0.5 * values[-2])

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        return {
            "weight_packed": Slot(torch.uint8, (rows, -(-columns // 2))),
            "weight_scale": Slot(torch.float32, (rows, n_groups(columns, self.group_size))),
            "weight_codebook": Slot(torch.float32, (ENTRIES,)),
        }

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk.

        Raises:
            NumericalError: A code does not fit in `bits` bits.
        """
        rows, columns = codes.shape
        largest = int(codes.max())
        if largest >> self.bits:
            raise NumericalError(
                f"code {largest} does not fit in {self.bits} bits (at most {(1 << self.bits) - 1})",
                "the method that chose the codes is at fault: encode with the same format that packs",
            )
        tensors = {
            "weight_packed": pack_nibbles(codes),
            "weight_scale": q.scale.contiguous(),
            # A tensor of its own: matrices may share a table, and safetensors refuses shared memory in one file.
            "weight_codebook": F.pad(_table(q), (0, ENTRIES - (1 << self.bits))).clone(),
        }
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`, or are no valid table.
        """
        require_layout(self, packed)
        table = packed.tensors["weight_codebook"][: 1 << self.bits]
        reason = refuse_table(tuple(table.tolist()), self.bits)
        codes = unpack_nibbles(packed.tensors["weight_packed"], packed.shape[1])
        if reason is None and int(codes.max()) >> self.bits:
            reason = f"code {int(codes.max())} lies outside it"
        if reason is not None:
            raise CheckpointError(f"weight_codebook of {self.name}: {reason}", "the checkpoint is damaged")
        return codes, QParams(packed.tensors["weight_scale"], codebook=table)

    def scheme(self) -> None:
        """Return None: compressed-tensors cannot express tables."""
        return None


def refuse_table(table: tuple[float, ...], bits: int) -> str | None:
    """Return why these values cannot be a table of `bits` bits, or None."""
    if len(table) != 1 << bits:
        return f"{len(table)} values instead of {1 << bits}"
    if not all(math.isfinite(value) for value in table):
        return "a value is NaN or Inf"
    if 0.0 not in table or max(table) <= 0 or min(table) >= 0:
        return "zero, a positive and a negative value are needed"
    return None


def nearest(z: Tensor, table: Tensor) -> Tensor:
    """Return the codes of the entries nearest to float32 `z`: uint8, same shape.

    Ties go to the even code. Of equal entries (0 and -0, or repeated ones) the first is used.
    """
    values, order = table.sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    values, codes = values[first], order[first].to(torch.uint8)
    limits = ((values[:-1].double() + values[1:].double()) / 2).float()
    # A value on a limit goes down; where the code above is the even one, the limit moves just below itself.
    down = torch.nextafter(limits, torch.full_like(limits, -math.inf))
    limits = torch.where(codes[1:] % 2 == 0, down, limits)
    return codes[torch.bucketize(z.contiguous(), limits, out_int32=True)]


def _table(q: QParams) -> Tensor:
    assert q.codebook is not None, "codebook parameters carry a table"
    return q.codebook
