"""FP8: E4M3 codes with one floating scale per output channel, per matrix, or per 128 x 128 tile.

On disk this is compressed-tensors' `float-quantized`: `w = float(weight) * weight_scale`. The codes of this module are
the bit patterns of the float8 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import NumericalError, UnsupportedError
from compressor.formats.base import PackedTensor, QParams, Slot, group_absmax, refuse_matrix, require_layout
from compressor.formats.e4m3 import E4M3_MAX, E4M3_NAN_CODES, decode_e4m3, e4m3_weight, encode_e4m3
from compressor.formats.ints import SCALE_DTYPES

BLOCK = 128

Granularity = Literal["channel", "tensor", "block"]


@dataclass(frozen=True)
class FP8:
    """8-bit floats; 8 bits per weight and the scales, of which there are few.

    Attributes:
        granularity: What shares one scale: a row (`channel`), the whole matrix (`tensor`), or a tile of 128 x 128
            (`block`), smaller at the lower and right edges of a matrix that tiles do not fill.
        dtype: Dtype of the stored scales. Readers cast scales to the checkpoint's dtype, so it should be that one.
    """

    granularity: Granularity
    dtype: torch.dtype

    bits: ClassVar[int] = 8
    has_global_scale: ClassVar[bool] = False
    container: ClassVar[str] = "float-quantized"
    nan_codes: ClassVar[tuple[int, ...]] = E4M3_NAN_CODES

    def __post_init__(self) -> None:
        if self.dtype not in SCALE_DTYPES:
            raise UnsupportedError(
                f"{self.name} scales of dtype {self.dtype}", "readers know bfloat16, float16 and float32 scales"
            )

    @property
    def name(self) -> str:
        """The name users type."""
        return "fp8" if self.granularity == "channel" else f"fp8-{self.granularity}"

    @property
    def group_size(self) -> int | None:
        """Inputs that share one scale; the last tile of a row may have fewer. None where a whole row does."""
        return BLOCK if self.granularity == "block" else None

    def refuse(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored, or None; tiles need not divide it."""
        return refuse_matrix(shape, None)

    def fit_global(self, weights: Sequence[Tensor]) -> None:
        """Return None: there is no global scale."""

    def fit(self, w: Tensor, global_scale: Tensor | None = None) -> QParams:
        """Return min-max scales, shaped as `layout` says: the largest magnitude over 448, then rounded.

        A scale that is zero once rounded becomes the machine epsilon of its dtype, as in compressed-tensors.

        Raises:
            NumericalError: `w` holds NaN or Inf, or the grid does not fit the scale dtype or float32.
        """
        assert global_scale is None, "FP8 has no global scale"
        absmax = self._absmax(w)
        scale = (absmax / E4M3_MAX).to(self.dtype)
        scale = torch.where(scale == 0, torch.finfo(self.dtype).eps, scale)
        if not torch.isfinite(scale.float() * E4M3_MAX).all():
            raise NumericalError(
                f"weights of magnitude {float(absmax.max()):.3g} overflow {self.name} with {self.dtype} scales",
                "keep this layer as it is with --skip, or store scales in bfloat16 or float32",
            )
        return QParams(scale)

    def encode(self, w: Tensor, q: QParams) -> Tensor:
        """Return the nearest codes, uint8 `[out, in]`, in float32 against the stored scale; ties to even, no NaN."""
        return encode_e4m3(w.float() / self._spread(q.scale, w.shape))

    def decode(self, codes: Tensor, q: QParams) -> Tensor:
        """Return `float(weight) * scale`, float32 `[out, in]`."""
        return decode_e4m3(codes).mul_(self._spread(q.scale, codes.shape))

    def layout(self, shape: tuple[int, int]) -> dict[str, Slot]:
        """Return suffix -> dtype and shape of the stored tensors."""
        rows, columns = shape
        scales = {
            "channel": (rows, 1),
            "tensor": (1,),
            "block": (-(-rows // BLOCK), -(-columns // BLOCK)),
        }[self.granularity]
        return {"weight": Slot(torch.float8_e4m3fn, shape), "weight_scale": Slot(self.dtype, scales)}

    def pack(self, codes: Tensor, q: QParams) -> PackedTensor:
        """Return the bytes on disk.

        Raises:
            NumericalError: A code means NaN.
        """
        rows, columns = codes.shape
        tensors = {"weight": e4m3_weight(codes), "weight_scale": q.scale.contiguous()}
        return PackedTensor(self.name, (rows, columns), tensors)

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and scales; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        require_layout(self, packed)
        return packed.tensors["weight"].view(torch.uint8), QParams(packed.tensors["weight_scale"])

    def scheme(self) -> dict[str, object]:
        """Return the compressed-tensors `weights` arguments."""
        scheme: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        scheme["strategy"] = self.granularity
        if self.granularity == "block":
            scheme["block_structure"] = [BLOCK, BLOCK]
        return scheme

    def _absmax(self, w: Tensor) -> Tensor:
        """Return the largest magnitude under each scale, float32, in the shape of the scales."""
        rows = group_absmax(w, None)  # [out, 1]; names the place of a NaN or Inf
        if self.granularity == "channel":
            return rows
        if self.granularity == "tensor":
            return rows.amax().reshape(1)
        strips = group_absmax(F.pad(w, (0, -w.shape[1] % BLOCK)), BLOCK)  # [out, column blocks]
        strips = F.pad(strips, (0, 0, 0, -w.shape[0] % BLOCK))
        blocks: Tensor = strips.unflatten(0, (-1, BLOCK)).amax(1)  # [row blocks, column blocks]
        return blocks

    def _spread(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the scale of every weight, float32, broadcastable to `shape` `[out, in]`."""
        scale = scale.float()
        if self.granularity != "block":
            return scale
        wide = scale.repeat_interleave(BLOCK, 1)[:, : shape[1]]
        return wide.repeat_interleave(BLOCK, 0)[: shape[0]]
