"""What a method that searches masks over the whole model gets to see, and how the engine recognises it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.methods.base import Method
from compressor.plan import LayerPlan, Plan
from compressor.report import Progress


@dataclass(frozen=True)
class ModelView:
    """One model on its way through a search.

    Attributes:
        plan: What will be pruned.
        source: Original tensors.
        skeleton: The model without weights; filled and emptied block by block.
        blocks: Its block sequence.
        tokens: Calibration tokens `[n_samples, seq_len]`.
        work: Folder for what is unfinished; it survives a killed run.
        seed: Seed of everything random.
        progress: Who is told.
        one_shot: Runs a LAYER method over all blocks, each behind the pruned ones before it, and writes nothing.
    """

    plan: Plan
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    tokens: Tensor
    work: Path
    seed: int
    progress: Progress
    one_shot: Callable[[Method], None]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.skeleton.device


@runtime_checkable
class SearchMethod(Method, Protocol):
    """Searches over the whole model before the first block is decided; it reads calibration data."""

    def memory(self, layers: Sequence[LayerPlan]) -> int:
        """Return the bytes it holds, beside the weights, while it looks at one block with these compressed layers."""
        ...

    def fingerprint(self) -> str | None:
        """Return the hash of whatever file the search begins with, or None; it is part of the run's digest."""
        ...

    def search(self, view: ModelView) -> list[str]:
        """Search, or continue where a killed run stopped; return events for the report."""
        ...

    def publish(self, out: Path) -> None:
        """Write side records into the finished folder."""
        ...
