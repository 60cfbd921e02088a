"""The calibration samples on their way through the blocks: hidden states on disk, one file per stream and boundary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration.capture import Capture
from compressor.calibration.stats import LANES, samples_of
from compressor.calibration.store import Boundary, HiddenStore
from compressor.checkpoint.blocks import BlockSequence, Recording
from compressor.methods.base import Stream
from compressor.ranks import ALONE, Ranks

FP, COMPRESSED = Stream.FP.value, Stream.COMPRESSED.value

CARRIED = {
    Stream.NONE: (),
    Stream.FP: (FP,),
    Stream.COMPRESSED: (COMPRESSED,),
    Stream.BOTH: (FP, COMPRESSED),
}
"""Streams that are carried through the model for a method."""


class Streams:
    """Carries samples from block to block.

    Every process runs the samples of lanes of its own, and those of the reserve that fall to it. Where statistics
    cannot be put together from parts, or experts must be topped up, all processes run all samples.

    Args:
        folder: Where hidden states live.
        names: The streams to carry: `fp`, `compressed`, both or none.
        blocks: The block sequence; the weights of the block that runs must be loaded.
        tokens: Calibration tokens `[n_samples, seq_len]`, or pixels `[n_samples, n, channels, height, width]`; None if
            no stream is carried.
        device: Where samples are run.
        products: The context they are run in.
        reserve: Tokens `[n, seq_len]` of further samples, from which experts that few tokens reach are topped up.
        ranks: The processes that share the samples.
    """

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        blocks: BlockSequence,
        tokens: Tensor | None,
        device: torch.device,
        products: AbstractContextManager[None],
        reserve: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        assert tokens is not None or not names, "streams carry calibration tokens"
        self.blocks, self.device, self.products = blocks, device, products
        self.n_samples = 0 if tokens is None else tokens.shape[0]
        self.on_reserve = False
        self.tokens = tokens if tokens is None or reserve is None else torch.cat([tokens, reserve])
        self.ranks = ranks
        self.stores = {name: HiddenStore(folder, name, device, ranks) for name in names}
        self.recording: Recording | None = None

    def enter(self, first: bool) -> dict[str, Boundary]:
        """Record what blocks get beside hidden states, and if `first` write the states that enter block 0.

        Raises:
            UnsupportedError: Block arguments change from sample to sample.
        """
        if not self.stores:
            return {}
        _, self.recording = self.blocks.prologue(self._inputs(0))
        for sample in {min(1, self.n_samples - 1), self.n_samples - 1}:
            self.recording.check_same(self.blocks.prologue(self._inputs(sample))[1])
        entering: dict[str, Boundary] = {}
        for name, store in self.stores.items() if first else ():
            with store.writer(0) as writer:
                for sample in self._writes():
                    writer.put(sample, self.blocks.prologue(self._inputs(sample))[0])
                entering[name] = writer.close()
        return entering

    def advance(self, index: int, name: str, before: Mapping[str, Boundary], capture: Capture | None) -> Boundary:
        """Run every sample of a stream through block `index` as it now is, and write what leaves it."""
        writes = set(self._writes())
        with self.stores[name].writer(index + 1) as writer:
            for sample, leaving in self._main(index, name, before, capture):
                if sample in writes:
                    writer.put(sample, leaving)
            for sample, leaving in self._reserve(index, name, before, capture):
                if sample in writes:
                    writer.put(sample, leaving)
            boundary = writer.close()
        if capture:
            self._top_up(index, name, before, capture)
        return boundary

    def observe(self, index: int, before: Mapping[str, Boundary], capture: Capture, name: str = COMPRESSED) -> None:
        """Collect statistics of what the block as it now is makes of a stream, as a rule the compressed prefix."""
        for _ in self._main(index, name, before, capture):
            pass
        capture.coverage.from_reserve = True
        for sample in range(self.n_samples, self._in_all):
            if not capture.coverage.lacking():
                break
            with capture.attached(), torch.no_grad(), self.products, self._on_reserve(True):
                self.run(index, self.stores[name].read(before[name], sample))
        self._top_up(index, name, before, capture)

    def watch(self, index: int, before: Mapping[str, Boundary]) -> None:
        """Run every sample behind the compressed prefix through the block as it now is, for others to look on."""
        with torch.no_grad():
            for sample in range(self.n_samples):
                with self.products:
                    self.run(index, self.stores[COMPRESSED].read(before[COMPRESSED], sample))

    def run(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run block `index` on one sample; see `BlockSequence.run`."""
        assert self.recording is not None, "enter() comes first"
        return self.blocks.run(index, hidden, self.recording, weights)

    def drop_all_but(self, keep: Mapping[str, Boundary]) -> None:
        """Delete the files of other boundaries."""
        for name, store in self.stores.items():
            store.drop_all_but(keep.get(name))

    def intact(self, saved: Mapping[str, Boundary]) -> bool:
        """Return whether every carried stream's file is there and unchanged."""
        return all(name in saved and store.intact(saved[name]) for name, store in self.stores.items())

    def _inputs(self, sample: int) -> dict[str, Tensor]:
        assert self.tokens is not None
        chosen = self.tokens[sample : sample + 1].to(self.device)
        if chosen.is_floating_point():  # the images of one sample
            chosen = chosen.flatten(0, 1)
        return {self.blocks.model.main_input_name: chosen}

    @contextmanager
    def _on_reserve(self, used: bool) -> Iterator[None]:
        """Say in `on_reserve` whether what runs now belongs to the reserve."""
        self.on_reserve = used
        try:
            yield
        finally:
            self.on_reserve = False

    @property
    def _in_all(self) -> int:
        """Samples, those of the reserve included."""
        return 0 if self.tokens is None else self.tokens.shape[0]

    def _writes(self) -> Iterator[int]:
        """Yield the samples whose states this process writes."""
        rank, size = self.ranks.rank, self.ranks.size
        for lane in range(rank, self._lanes, size):
            yield from samples_of(lane, self.n_samples)
        yield from range(self.n_samples + rank, self._in_all, size)

    @property
    def _lanes(self) -> int:
        return min(LANES, self.n_samples)

    def _main(
        self, index: int, name: str, before: Mapping[str, Boundary], capture: Capture | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield what leaves the block as it now is, sample by sample, while statistics are collected.

        In each round as many lanes are run as there are processes, and then added in order: a total is the same sum in
        the same order whoever ran what.
        """
        ranks = self.ranks if capture is None or capture.divisible else ALONE
        with capture.attached() if capture else nullcontext(), torch.no_grad():
            for first in range(0, self._lanes, ranks.size):
                lane = first + ranks.rank
                for sample in samples_of(lane, self.n_samples) if lane < self._lanes else ():
                    with self.products:
                        leaving = self.run(index, self.stores[name].read(before[name], sample))
                    yield sample, leaving
                if capture and ranks.size > 1:
                    capture.join_lanes(min(ranks.size, self._lanes - first))
                elif capture:
                    capture.close_lane()
        if capture and ranks.size > 1:
            capture.count_rows()

    def _reserve(
        self, index: int, name: str, before: Mapping[str, Boundary], capture: Capture | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield what leaves the block of samples of the reserve; experts that lack tokens look at them."""
        looked_at = capture is not None and bool(capture.coverage.lacking())
        ranks = ALONE if looked_at else self.ranks
        if capture:
            capture.coverage.from_reserve = True
        with capture.attached() if capture else nullcontext(), torch.no_grad():
            for sample in range(self.n_samples + ranks.rank, self._in_all, ranks.size):
                with self.products, self._on_reserve(True):
                    leaving = self.run(index, self.stores[name].read(before[name], sample))
                yield sample, leaving

    def _top_up(self, index: int, name: str, before: Mapping[str, Boundary], capture: Capture) -> None:
        """Close the lane of the reserve, and send calibration tokens to experts that lack some still.

        Raises:
            CoverageError: There are too few tokens for that.
        """
        capture.close_lane()
        capture.coverage.from_reserve = False
        if forced := capture.forced():
            with forced.attached(), torch.no_grad():
                for sample in range(self.n_samples):
                    with self.products:
                        self.run(index, self.stores[name].read(before[name], sample))
            capture.add_forced(forced)
        capture.coverage.check()
