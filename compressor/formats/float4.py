"""LLM-FP4's own 4-bit floats, stored as nibbles beside the table they index; what they mean: `split_floats.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.base import PackedTensor, QParams
from compressor.formats.small_floats import SPLITS as MANTISSAS
from compressor.formats.split_floats import POINTS, Grid, SplitFloat, float_table, split_name, table_of

__all__ = ["POINTS", "SPLITS", "Float4", "Grid"]

SPLITS: dict[str, tuple[float, ...]] = {split_name(4, m): float_table(4, m) for m in MANTISSAS[4]}
"""Table of every split (E2M1, E1M2, E3M0), the one of min-max fitting first; code 8 is -0."""


@dataclass(frozen=True)
class Float4(SplitFloat):
    """4-bit floats with one real scale per output channel; 4 bits per weight, 4 bytes per row, 64 per matrix."""

    bits: int = field(default=4, init=False)
    table: tuple[float, ...] = field(default=SPLITS["e2m1"], init=False)
    grid: Grid = "additive"

    @property
    def name(self) -> str:
        """The name users type."""
        return "fp4"

    def unpack(self, packed: PackedTensor) -> tuple[Tensor, QParams]:
        """Return codes and parameters; the exact inverse of `pack`.

        Raises:
            CheckpointError: The tensors are not what this format stores for `packed.shape`.
        """
        codes, q = super().unpack(packed)
        if tuple(table_of(q).tolist()) not in SPLITS.values():
            raise CheckpointError(
                f"weight_codebook is not a table of {self.name} ({', '.join(SPLITS)})", "the checkpoint is damaged"
            )
        return codes, q
