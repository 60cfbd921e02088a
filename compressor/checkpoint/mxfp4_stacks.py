"""Stacks of experts in MXFP4 as GPT-OSS publishes them: `*_blocks` of 4-bit codes, `*_scales` of shared exponents.

OCP Microscaling Formats (MX) Specification 1.0: 32 values share an exponent. A matrix of an expert is stored as
`[out, in]` and lies transposed in memory, so a stack stands for a tensor `[experts, in, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.errors import CheckpointError
from compressor.formats.bitstream import unpack_nibbles
from compressor.formats.e2m1 import decode_e2m1
from compressor.formats.e8m0 import decode_e8m0

GROUP = 32
"""Values that share an exponent."""

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class MXFP4Stack:
    """Decodes one stack, or one entry of it.

    Attributes:
        stack: Name of the tensor it stands for.
        index: The entry that is needed; None for all.
    """

    stack: str
    index: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        return f"{self.stack}{BLOCKS}", f"{self.stack}{SCALES}"

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return `[experts, in, out]` float32, or `[in, out]` where the parts are one entry of theirs."""
        blocks, scales = (tensors[part] for part in self.parts)  # [..., out, groups, 16], [..., out, groups]
        codes = unpack_nibbles(blocks.reshape(-1, GROUP // 2), GROUP)
        values = decode_e2m1(codes) * decode_e8m0(scales).reshape(-1, 1)
        return values.reshape(*scales.shape[:-1], -1).mT


def mxfp4_stacks(source: Source) -> dict[str, tuple[tuple[int, ...], MXFP4Stack]]:
    """Return the stacks of a checkpoint by the names they have in memory, with their shapes there.

    Raises:
        CheckpointError: Codes without exponents, or of a shape that does not go with them.
    """
    out: dict[str, tuple[tuple[int, ...], MXFP4Stack]] = {}
    for name, info in source.tensors.items():
        if not name.endswith(BLOCKS):
            continue
        stack = MXFP4Stack(name.removesuffix(BLOCKS))
        scales = source.tensors.get(stack.parts[1])
        if scales is None:
            raise CheckpointError(f"{stack.parts[1]}: is missing, {name} needs it", "the checkpoint is incomplete")
        if len(info.shape) != 4 or info.shape != (*scales.shape, GROUP // 2) or {info.dtype, scales.dtype} != {"U8"}:
            raise CheckpointError(
                f"{name}: is {info.dtype} {list(info.shape)}, and its scales {scales.dtype} {list(scales.shape)}; "
                f"codes are bytes [experts, out, groups, {GROUP // 2}], scales bytes [experts, out, groups]",
                "does config.json belong to these weights?",
            )
        experts, rows, groups = scales.shape
        out[stack.stack] = (experts, groups * GROUP, rows), stack
    return out
