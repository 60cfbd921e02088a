"""What all parts of one run work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration.stats import Statistic
from compressor.calibration.store import Boundary, HiddenStore
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.sink import Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.engine.contents import Contents
from compressor.engine.solver import Solver
from compressor.engine.streams import Streams
from compressor.formats.base import QuantFormat
from compressor.methods.base import Method
from compressor.plan import LayerPlan, Plan, WeightRef
from compressor.ranks import Ranks
from compressor.report import Progress

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Parts:
    """What all parts of one run work on.

    Attributes:
        plan: The sealed plan.
        refs: Tensor name -> what it is.
        source: The checkpoint that is read.
        skeleton: Its model; holds the weights of one block at a time.
        blocks: Its block sequence.
        method: The method.
        format_of: Gives the format of a compressed layer.
        specs: The statistics that the method wants.
        streams: The calibration samples on their way.
        pieces: Samples that were cut from each calibration sample.
        window: Tokens of the longest input that runs through a block.
        probe_store: The probe's states, which the leader keeps.
        solver: Hands layers to the method.
        sink: The shards of the result.
        contents: What is in them.
        min_expert_tokens: Tokens that statistics of every expert are to rest on; 0 for any number.
        max_memory: Bytes that may be resident; None for no bound.
        ranks: The processes that share the work.
        progress: Who is told.
    """

    plan: Plan
    refs: Mapping[str, WeightRef]
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    method: Method
    format_of: Callable[[LayerPlan], QuantFormat]
    specs: tuple[Statistic, ...]
    streams: Streams
    pieces: int
    window: int
    probe_store: HiddenStore
    solver: Solver
    sink: Sink
    contents: Contents
    min_expert_tokens: int
    max_memory: float | None
    ranks: Ranks
    progress: Progress

    @property
    def device(self) -> torch.device:
        """Where all of it is computed."""
        return self.skeleton.device

    def save_probe(self, boundary: int, hidden: Tensor) -> Boundary | None:
        """Write the probe's states, if this process is the one that writes."""
        if not self.ranks.leads:
            return None
        with self.probe_store.writer(boundary) as writer:
            writer.append(hidden)
            return writer.close()
