"""What a weight format is: the grid its codes mean and the bytes they become.

A format does not know how codes were chosen, and a method does not know how they are packed. Everything here works on
2-D matrices `[out, in]`; the plan supplies such a view for convolutions and fused experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from compressor.errors import CheckpointError, NumericalError

if TYPE_CHECKING:
    from compressor.formats import GroupSize


@dataclass(frozen=True)
class QParams:
    """Grid parameters of one matrix, already rounded to the dtype they are stored in.

    Attributes:
        scale: `[out, groups]`, in the dtype the format stores (bf16, fp16, fp32, float8_e4m3fn, or uint8 exponents).
            Formats whose scales cover more than one row: `[row blocks, column blocks]`, or `[1]` for a whole matrix.
        zero_point: The code that means zero, int8 in the shape of the scales, or None for symmetric grids. Signed: the
            smallest code of `b` bits counts as `-2**(b-1)`.
        global_scale: `[1]` float32 divisor shared by the whole matrix (NVFP4), or None.
        codebook: `[2**bits]` float32 values, for formats whose grid is a table.
        exponent: `[1]` float32, for formats whose table is made from it.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    codebook: Tensor | None = None
    exponent: Tensor | None = None


@dataclass(frozen=True)
class PackedTensor:
    """One matrix as it lies on disk: suffix -> tensor, e.g. `weight_packed`, `weight_scale`."""

    format: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class Slot:
    """Dtype and shape of a tensor that is not there yet, known from headers alone."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class QuantFormat(Protocol):
    """The contract of a weight format; `compressor.testing.FormatConformance` checks it."""

    @property
    def name(self) -> str:
        """The name users type."""
        ...

    @property
    def bits(self) -> int:
        """Bits of one code."""
        ...

    @property
    def group_size(self) -> int | None:
        """Inputs that share one scale; None means one group per row."""
        ...

    @property
    def has_global_scale(self) -> bool:
        """Whether matrices a runtime fuses must agree on one global scale."""
        ...

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a matrix of this shape cannot be stored, or None."""
        ...

    def fit_global(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the min-max global scale shared by these matrices (`[1]` float32), or None if there is none."""
        ...

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max parameters of `w` `[out, in]`; computed in float32, stored precision on return."""
        ...

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8, same shape as `w` (`[out, in]`)."""
        ...

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return what the codes mean, float32 `[out, in]`. This is the definition of the format."""
        ...

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk."""
        ...

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`."""
        ...

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of every tensor `pack` will produce for a matrix of this shape."""
        ...

    def scheme(self) -> dict[str, object] | None:
        """Return the compressed-tensors `weights` arguments, or None if that container cannot express the format."""
        ...

    @property
    def container(self) -> str | None:
        """The compressed-tensors format name (`pack-quantized`, ...), or None for native-only formats."""
        ...


@runtime_checkable
class ScaledFormat(QuantFormat, Protocol):
    """A format whose grid is fixed up to one step per group: what rounding a column, or learning a scale, needs.

    The value of a code is `steps * u`, with `u` from a short table (integers, E2M1 values, ...).
    """

    @property
    def mirrors(self) -> bool:
        """Whether negative steps can be stored and give a grid worth trying: one that reaches further above zero."""
        ...

    def round(self, w: Tensor, q: QParams) -> Tensor:
        """Return `decode(encode(w, q), q)`, float32, without making codes; zeros may differ in sign."""
        ...

    def steps(self, q: QParams) -> Tensor:
        """Return the value of one unit of the grid, float32 `[out, groups, 1]`; `[1, 1, 1]` for one scale in all."""
        ...

    def with_steps(self, q: QParams, steps: Tensor) -> QParams:
        """Return `q` with the storable scales nearest to `steps`, shaped as `steps(q)`; the rest stays.

        Steps are positive, or negative where the format `mirrors`.
        """
        ...

    def snap(self, z: Tensor, q: QParams) -> Tensor:
        """Return the unit nearest to every value of float32 `z` `[out, groups, any]`, as `encode` does; overwrites `z`.

        `q` says where the grid lies (zero points, table); its scales are not looked at.
        """
        ...

    def reach(self, q: QParams) -> tuple[Tensor | float, Tensor | float]:
        """Return the units below and above which values saturate: numbers, or shaped as `steps(q)`.

        Half a step beyond the last unit: what lies outside moves by more than rounding would move it.
        """
        ...


@runtime_checkable
class SearchableFormat(ScaledFormat, Protocol):
    """A format whose scales form a short, exact list of candidates around the min-max one.

    Its `round` also takes scales `[candidates, out, groups]` and rounds `w` `[out, in]` once for each.
    """

    def scale_candidates(self, q: QParams) -> Iterator[QParams]:
        """Yield parameters with every group's scale moved by the same step; the first is `q` itself."""
        ...

    def starts(self, w: Tensor, global_scale: Tensor | None = None) -> Iterator[QParams]:
        """Yield min-max parameters of `w` on every grid worth trying; the first is `fit(w, global_scale)`.

        A grid is what must be chosen before scales are: another global scale, another split of the bits. Where the
        format has a global scale, the n-th start of every matrix of a fused set has the same one.
        """
        ...


def grouped(w: Tensor, group_size: int | None) -> Tensor:
    """Return a view `[out, groups, group]` of `w` `[out, in]`."""
    group = group_size or w.shape[-1]
    view: Tensor = w.unflatten(-1, (-1, group))
    return view


def group_setting(fmt: QuantFormat) -> GroupSize:
    """Return the group size that builds this format by its name: `get_format(fmt.name, group_setting(fmt), dtype)`."""
    return "tensor" if getattr(fmt, "per_tensor", False) else fmt.group_size


def n_groups(in_features: int, group_size: int | None) -> int:
    """Return the number of groups in a row."""
    return 1 if group_size is None else in_features // group_size


def refuse_matrix(shape: tuple[int, ...], group_size: int | None) -> str | None:
    """Return the reason shared by all formats for not storing a tensor of this shape, or None."""
    if len(shape) != 2:
        return f"{len(shape)}-D tensor {tuple(shape)}: the format stores matrices"
    if 0 in shape:
        return f"empty matrix {tuple(shape)}"
    if group_size is not None and shape[1] % group_size:
        return f"{shape[1]} inputs do not divide into groups of {group_size}"
    return None


def bits_per_weight(fmt: QuantFormat, shape: tuple[int, int]) -> float:
    """Return stored bits per weight, scales included."""
    return 8 * sum(slot.nbytes for slot in fmt.layout(shape).values()) / math.prod(shape)


def group_absmax(w: Tensor, group_size: int | None) -> Tensor:
    """Return the largest magnitude of every group, float32 `[out, groups]`.

    Raises:
        NumericalError: `w` `[out, in]` holds NaN or Inf; the first place is named.
    """
    low, high = group_range(w, group_size)
    return torch.maximum(low.neg_(), high)


def group_range(w: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of every group, float32 `[out, groups]`.

    Raises:
        NumericalError: `w` `[out, in]` holds NaN or Inf; the first place is named.
    """
    low, high = torch.aminmax(grouped(w, group_size), dim=-1)
    low, high = low.float(), high.float()
    if not (torch.isfinite(low) & torch.isfinite(high)).all():  # NaN and Inf survive both, so the small result tells
        bad = (~torch.isfinite(w)).nonzero()
        row, column = bad[0].tolist()
        raise NumericalError(
            f"{len(bad)} of {w.numel()} weights are NaN or Inf in a matrix {list(w.shape)}, "
            f"the first at row {row}, column {column}",
            "the source checkpoint is damaged: compare its hash with the published one, or fetch it again",
        )
    return low, high


def require_layout(fmt: QuantFormat, packed: PackedTensor) -> None:
    """Check that `packed` has exactly the tensors `fmt` writes for its shape, before any bit of them is read.

    Raises:
        CheckpointError: Another format, a missing or extra tensor, one of another dtype or shape, or a stored
            `weight_shape` that is not that of the matrix.
    """
    if packed.format != fmt.name:
        raise CheckpointError(f"a {packed.format} tensor was given to the {fmt.name} reader", "check the config groups")
    reason = fmt.refuse(packed.shape)
    if reason is not None:
        raise CheckpointError(f"{fmt.name}: {reason}", "the group size in config.json does not fit the stored tensors")
    layout = fmt.layout(packed.shape)
    if layout.keys() != packed.tensors.keys():
        raise CheckpointError(
            f"{fmt.name} needs the tensors {', '.join(sorted(layout))}; found {', '.join(sorted(packed.tensors))}",
            "the checkpoint is incomplete or was written in another scheme (asymmetric, for example)",
        )
    for suffix, slot in layout.items():
        found = packed.tensors[suffix]
        if (found.dtype, tuple(found.shape)) != (slot.dtype, slot.shape):
            raise CheckpointError(
                f"{suffix} is {found.dtype} {list(found.shape)}, {fmt.name} stores {slot.dtype} {list(slot.shape)} "
                f"for a matrix {list(packed.shape)}",
                "the checkpoint is damaged, or config.json describes another bit width, group size or dtype",
            )
    if "weight_shape" in layout and (stored := packed.tensors["weight_shape"].tolist()) != list(packed.shape):
        raise CheckpointError(
            f"weight_shape says {stored}, the model expects {list(packed.shape)}",
            "config.json and weights belong to different models, or the file is damaged",
        )
