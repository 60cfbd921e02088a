"""What lies in no block: embeddings, last norm, head. Resident only while states enter or leave the blocks."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from compressor.checkpoint.sink import Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.decision import Quantized
from compressor.formats.base import QuantFormat
from compressor.methods.base import relative_error
from compressor.methods.tables import round_table
from compressor.plan import OUTSIDE, LayerPlan, Plan
from compressor.report import Progress, Row


class Outside:
    """The weights outside the blocks; inside a `with` the model holds them, rounded where the plan says so.

    Args:
        plan: A sealed plan.
        source: The checkpoint to read.
        skeleton: Its model without weights.
        format_of: Format of a compressed layer.
        progress: Who is told.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        skeleton: Skeleton,
        format_of: Callable[[LayerPlan], QuantFormat],
        progress: Progress,
    ) -> None:
        self.layers = plan.in_block(OUTSIDE)
        # Text passes by the towers of a multimodal model: their weights are copied, never run.
        self._run = [layer for layer in self.layers if layer.ref.part is None]
        self.source, self.skeleton, self.format_of, self.progress = source, skeleton, format_of, progress
        self._decided: dict[str, tuple[Quantized, Row]] = {}

    def __enter__(self) -> None:
        self.skeleton.load(self.source.read(layer.ref.name for layer in self._run))
        self._round()

    def __exit__(self, *_: object) -> None:
        self.skeleton.free({layer.ref.param for layer in self._run})
        gc.collect()

    def rows(self) -> list[Row]:
        """Return what the report says of each tensor; those that are rounded have been in the model once."""
        return [
            self._decided[layer.ref.name][1]
            if layer.format
            else Row(layer.ref.name, "kept", layer.kept_because, layer.bytes_before, layer.bytes_after)
            for layer in self.layers
        ]

    def write(self, sink: Sink) -> None:
        """Write everything, tensor by tensor: embeddings can be large."""
        for layer in self.layers:
            if layer.format:
                decided = self._decided[layer.ref.name][0]
                packed = self.format_of(layer).pack(decided.codes, decided.qparams).tensors
                sink.write({f"{layer.ref.module}.{suffix}": value for suffix, value in packed.items()})
            else:
                sink.write(self.source.read([layer.ref.name]))

    def _round(self) -> None:
        """Round in the model what has a format; what is decided once stays so."""
        for layer in self.layers:
            if not layer.format:
                continue
            part, fmt = self.skeleton.part(layer.ref.param, layer.ref.where), self.format_of(layer)
            if layer.ref.name not in self._decided:
                self.progress.stage(f"rounding {layer.ref.name}")
                decided = round_table(part, fmt)
                decoded = fmt.decode(decided.codes, decided.qparams)
                sizes = layer.bytes_before, layer.bytes_after
                error, zeros = relative_error(part, decoded), 1 - int(torch.count_nonzero(decoded)) / decoded.numel()
                row = Row(layer.ref.name, fmt.name, None, *sizes, weight_error=error, sparsity=zeros)
                self._decided[layer.ref.name] = decided, row
            decided = self._decided[layer.ref.name][0]
            part.copy_(fmt.decode(decided.codes, decided.qparams))
