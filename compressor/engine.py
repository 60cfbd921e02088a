"""Executes a sealed plan: streams blocks through method and format, one resident at a time, and can stop anywhere.

For each block: load it, run the calibration samples through it while statistics are collected, let the method decide,
put the decided values back, write the packed bytes, append a journal line, free the block. A unit counts as finished
when its journal line is on the disk; a rerun continues behind the last one and writes the same bytes.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import kv_cache
from compressor.calibration.capture import Capture
from compressor.calibration.stats import SecondMoment, lane_of
from compressor.calibration.store import Boundary, HiddenStore
from compressor.checkpoint.blocks import BlockSequence, Recording, example_inputs
from compressor.checkpoint.sink import WORK, Journal, Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, Source
from compressor.decision import Decision, Kept, Quantized
from compressor.errors import NumericalError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import QuantFormat, Slot
from compressor.methods.base import Layer, Method, Scope, Stream, relative_error
from compressor.plan import OUTSIDE, LayerPlan, Plan
from compressor.report import Progress, Row
from compressor.unit import Unit

PROBE_TOKENS = 32


class Engine:
    """Runs one plan.

    Args:
        plan: A sealed plan.
        source: The checkpoint to read.
        skeleton: Its model without weights; filled and emptied here.
        blocks: Its block sequence, traced.
        method: The method.
        tokens: Calibration tokens `[n_samples, seq_len]`, or None for data-free methods.
        out: The folder to write; `out/.compress-work` must exist and be ours.
        seed: Seed of the method's generators.
        progress: Who is told.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        skeleton: Skeleton,
        blocks: BlockSequence,
        method: Method,
        tokens: Tensor | None,
        out: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        self.plan, self.source, self.skeleton, self.blocks = plan, source, skeleton, blocks
        self.method, self.tokens, self.seed, self.progress = method, tokens, seed, progress
        dtype = DTYPES[plan.default_dtype]
        self._formats = {key: get_format(key[0], key[1], dtype) for key in plan.formats}
        self.specs = tuple(dict.fromkeys(spec for fmt in self._formats.values() for spec in method.stats(fmt)))
        self.device = skeleton.device
        self.work = out / WORK
        self.sink = Sink(out, self._slots())
        self.journal = Journal(self.work / "journal.jsonl")
        fp_anyway = (Stream.FP,) if any(site.format for site in plan.sites) else ()
        streams = {
            Stream.NONE: fp_anyway,
            Stream.FP: (Stream.FP,),
            Stream.COMPRESSED: (Stream.COMPRESSED,),
            Stream.BOTH: (Stream.FP, Stream.COMPRESSED),
        }[method.stream]
        self.stores = {stream.value: HiddenStore(self.work / "hidden", stream.value, self.device) for stream in streams}
        self.probe_store = HiddenStore(self.work / "hidden", "probe", self.device)

    def run(self) -> list[Unit]:
        """Run every unit that is not finished yet and return all of them; shards stay in the work folder."""
        done = self._finished()
        self.sink.allocate()
        names = [*self.plan.blocks, "outside the blocks"]
        self.progress.units(len(names), len(done))
        if len(done) == len(names):
            return done
        with self._outside_resident():
            recordings, entering = self._prologue(first=not done)
        probe = entering.pop("probe", None)
        current = Unit("start", "", [], [], probe, entering)
        if done:
            current = done[-1]
        for index in range(len(done), len(self.plan.blocks)):
            started = time.monotonic()
            current = self._block(index, current, recordings)
            self._commit(current, done, started)
        started = time.monotonic()
        current = self._outside(current)
        self._commit(current, done, started)
        return done

    def probe_inputs(self) -> dict[str, Tensor]:
        """Return the fixed inputs whose output is compared after reloading."""
        return example_inputs(self.skeleton.model, self.device, length=PROBE_TOKENS)

    def probe_output(self, unit: Unit) -> Tensor:
        """Return the compressed model's output on the probe, float32, from the states after the last block."""
        assert unit.probe is not None
        hidden = self.probe_store.read(unit.probe, 0)
        with self._outside_resident(), torch.no_grad():
            return self.blocks.tail(hidden, self.probe_inputs()).float()

    def format_of(self, layer: LayerPlan) -> QuantFormat:
        """Return the format of a compressed layer."""
        assert layer.format is not None, layer.ref.name
        return self._formats[layer.format, layer.group_size]

    def _slots(self) -> dict[str, Slot]:
        """Name, dtype and shape of every tensor of the result, in plan order."""
        slots: dict[str, Slot] = {}
        for layer in self.plan.layers:
            if layer.format:
                assert layer.ref.matrix is not None
                for suffix, slot in self.format_of(layer).layout(layer.ref.matrix).items():
                    slots[f"{layer.ref.module}.{suffix}"] = slot
            else:
                slots[layer.ref.name] = Slot(DTYPES[layer.ref.dtype], layer.ref.shape)
        for block in range(len(self.plan.blocks)):
            for name in self._cache_scales(block):
                slots[name] = Slot(DTYPES[self.plan.default_dtype], (1,))
        return slots

    def _cache_scales(self, block: int) -> list[str]:
        """Return the names of the key/value cache scales of a block."""
        return [f"{module}.{suffix}" for module in self.plan.cached(block) for suffix in kv_cache.SCALES]

    def _finished(self) -> list[Unit]:
        """Read the journal and check that what it says is still true; otherwise start again, and say so."""
        units = [Unit.from_json(entry) for entry in self.journal.read()]
        names = [*self.plan.blocks, "outside the blocks"]
        for index, unit in enumerate(units):
            block = index if index < len(self.plan.blocks) else OUTSIDE
            if unit.name != names[index] or self.sink.unit_hash(self._unit_tensors(block)) != unit.sha256:
                return self._restart(f"{unit.name}: what is on disk is not what was written")
        if units and len(units) < len(names):
            last = units[-1]
            kept = [
                (self.probe_store, last.probe),
                *((self.stores[name], last.streams.get(name)) for name in self.stores),
            ]
            for store, boundary in kept:
                if boundary is None or not store.intact(boundary):
                    return self._restart("saved hidden states are damaged")
        return units

    def _restart(self, why: str) -> list[Unit]:
        self.progress.event(f"{why}: starting from the first block")
        self.journal.path.unlink()
        return []

    def _unit_tensors(self, block: int) -> list[str]:
        names = []
        for layer in self.plan.in_block(block):
            if layer.format and layer.ref.matrix:
                names += [f"{layer.ref.module}.{suffix}" for suffix in self.format_of(layer).layout(layer.ref.matrix)]
            else:
                names.append(layer.ref.name)
        return names + (self._cache_scales(block) if block != OUTSIDE else [])

    def _commit(self, unit: Unit, done: list[Unit], started: float) -> None:
        self.journal.append(asdict(unit))
        done.append(unit)
        self.probe_store.drop_all_but(unit.probe)
        for name, store in self.stores.items():
            store.drop_all_but(unit.streams.get(name))
        errors = [row.error for row in unit.rows if row.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        for event in unit.events:
            self.progress.event(event)
        self.progress.unit_done(unit.name, mean, time.monotonic() - started)

    def _outside_resident(self) -> _Outside:
        return _Outside(self)

    def _inputs(self, sample: int) -> dict[str, Tensor]:
        assert self.tokens is not None
        return {self.skeleton.model.main_input_name: self.tokens[sample : sample + 1].to(self.device)}

    def _prologue(self, first: bool) -> tuple[dict[str, Recording], dict[str, Boundary]]:
        """Record block arguments, and on a fresh start write the states that enter block 0."""
        recordings: dict[str, Recording] = {}
        entering: dict[str, Boundary] = {}
        hidden, recordings["probe"] = self.blocks.prologue(self.probe_inputs())
        if first:
            entering["probe"] = self._save_probe(0, hidden)
        if not self.stores:
            return recordings, entering
        assert self.tokens is not None
        n_samples = self.tokens.shape[0]
        self.progress.stage("embedding calibration samples")
        _, recordings["calibration"] = self.blocks.prologue(self._inputs(0))
        for sample in {min(1, n_samples - 1), n_samples - 1}:
            recordings["calibration"].check_same(self.blocks.prologue(self._inputs(sample))[1])
        if first:
            for name, store in self.stores.items():
                with store.writer(0) as writer:
                    for sample in range(n_samples):
                        writer.append(self.blocks.prologue(self._inputs(sample))[0])
                    entering[name] = writer.close()
        return recordings, entering

    def _block(self, index: int, before: Unit, recordings: dict[str, Recording]) -> Unit:
        """Compress one block and write it."""
        layers = self.plan.in_block(index)
        tensors = self.source.read(layer.ref.name for layer in layers)
        self.skeleton.load(tensors)
        streams: dict[str, Boundary] = {}
        capture = self._capture(layers)
        ranges = {name: kv_cache.KVRange(self.skeleton.model.get_submodule(name)) for name in self.plan.cached(index)}
        if self.stores:
            wanted = Stream.FP if Stream.FP.value in self.stores else Stream.COMPRESSED
            streams = self._run_samples(index, wanted.value, before, recordings["calibration"], capture)
        rows, events, packed = self._solve(layers, capture, tensors)
        for name, seen in ranges.items():
            packed.update(self._quantize_cache(name, seen))
        if Stream.COMPRESSED.value in self.stores:
            name = Stream.COMPRESSED.value
            streams[name] = self._run_samples(index, name, before, recordings["calibration"], None)[name]
        assert before.probe is not None
        probe = self.probe_store.read(before.probe, 0)
        with torch.no_grad():
            probe = self.blocks.run(index, probe, recordings["probe"])
        if not torch.isfinite(probe).all():
            raise NumericalError(
                f"{self.plan.blocks[index]}: its compressed output is not finite", "try another format"
            )
        unit_hash = self.sink.write(packed)
        self.skeleton.free({layer.ref.param for layer in layers})
        saved = self._save_probe(index + 1, probe)
        del tensors, packed, capture
        gc.collect()
        return Unit(self.plan.blocks[index], unit_hash, rows, events, saved, streams)

    def _quantize_cache(self, name: str, seen: kv_cache.KVRange) -> dict[str, Tensor]:
        """Fix the cache scales of an attention module and let it compute with them from now on."""
        scales = seen.scales(name, DTYPES[self.plan.default_dtype])
        module = self.skeleton.model.get_submodule(name)
        for suffix, scale in scales.items():
            module.register_buffer(suffix, scale, persistent=False)
        kv_cache.simulate(module)
        return {f"{name}.{suffix}": scale.cpu() for suffix, scale in scales.items()}

    def _save_probe(self, boundary: int, hidden: Tensor) -> Boundary:
        with self.probe_store.writer(boundary) as writer:
            writer.append(hidden)
            return writer.close()

    def _capture(self, layers: tuple[LayerPlan, ...]) -> Capture | None:
        """Prepare accumulators, one per tensor that compressed layers read."""
        if not self.specs:
            return None
        widths, modules = {}, {}
        for layer in layers:
            if layer.format and layer.ref.matrix:
                widths[layer.ref.fed_by] = layer.ref.matrix[1]
                modules[layer.ref.fed_by] = self.skeleton.model.get_submodule(layer.ref.param.rpartition(".")[0])
                if "#" in layer.ref.fed_by:
                    modules[layer.ref.fed_by] = self.skeleton.model.get_submodule(layer.ref.fed_by.partition("#")[0])
        return Capture(widths, modules, self.specs, self.device)

    def _run_samples(
        self, index: int, stream: str, before: Unit, recording: Recording, capture: Capture | None
    ) -> dict[str, Boundary]:
        """Run every sample of a stream through the block as it now is, and write what leaves it."""
        assert self.tokens is not None
        store, boundary = self.stores[stream], before.streams[stream]
        n_samples = self.tokens.shape[0]
        attached = capture.attached() if capture else nullcontext()
        with store.writer(index + 1) as writer, attached, torch.no_grad():
            for sample in range(n_samples):
                writer.append(self.blocks.run(index, store.read(boundary, sample), recording))
                lane_ends = sample + 1 == n_samples or lane_of(sample, n_samples) != lane_of(sample + 1, n_samples)
                if capture and lane_ends:
                    capture.close_lane()
            return {stream: writer.close()}

    def _solve(
        self, layers: tuple[LayerPlan, ...], capture: Capture | None, tensors: Mapping[str, Tensor]
    ) -> tuple[list[Row], list[str], dict[str, Tensor]]:
        """Let the method decide every compressed layer; returns report rows, events and the tensors to write."""
        rows: list[Row] = []
        events: list[str] = []
        packed: dict[str, Tensor] = {}
        for layer in layers:
            if not layer.format:
                rows.append(Row(layer.ref.name, "kept", layer.kept_because, layer.bytes_before, layer.bytes_after))
                packed[layer.ref.name] = tensors[layer.ref.name]
        groups: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            if layer.format:
                groups.setdefault(layer.ref.fused_with, []).append(layer)
        for members in groups.values():
            fmt = self.format_of(members[0])
            tasks = self._tasks(members, fmt, capture)
            decisions: dict[str, Decision] = {}
            for outcome in self._call(tasks, fmt):
                decisions.update(outcome.decisions)
                events += outcome.events
            for plan, task in zip(members, tasks, strict=True):
                row, written = self._apply(plan, task, decisions[plan.ref.name])
                rows.append(row)
                packed.update(written)
        return rows, events, packed

    def _tasks(self, members: list[LayerPlan], fmt: QuantFormat, capture: Capture | None) -> list[Layer]:
        weights = [self.skeleton.part(m.ref.param, m.ref.where).detach().clone() for m in members]
        shared = fmt.fit_global(weights) if fmt.has_global_scale else None
        return [
            Layer(m.ref, weight, shared, capture.sums[m.ref.fed_by] if capture else {})
            for m, weight in zip(members, weights, strict=True)
        ]

    def _call(self, tasks: list[Layer], fmt: QuantFormat) -> list[Any]:
        """Hand the layers to the method at the scope it asked for."""
        method: Any = self.method
        if method.scope is Scope.LAYER:
            return [method.solve(task, fmt, self._generator(task.ref.name)) for task in tasks]
        if method.scope is Scope.GROUP:
            return [method.solve_group(tasks, fmt, self._generator(tasks[0].ref.fused_with))]
        raise UnsupportedError(f"method {method.name} has scope {method.scope.value}, which this engine cannot run yet")

    def _generator(self, name: str) -> torch.Generator:
        """A generator that depends on the seed and the layer only, never on what ran before."""
        digest = hashlib.sha256(f"{self.seed}\0{self.method.name}\0{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _apply(self, plan: LayerPlan, task: Layer, decision: Decision) -> tuple[Row, dict[str, Tensor]]:
        """Check a decision, put its values into the block, and return the report row and the bytes to write."""
        ref = plan.ref
        if isinstance(decision, Kept):
            raise UnsupportedError(f"{ref.name}: method {self.method.name} kept it ({decision.reason}) after planning")
        assert isinstance(decision, Quantized)
        fmt = self.format_of(plan)
        decoded = fmt.decode(decision.codes, decision.qparams)
        if not torch.isfinite(decoded).all():
            raise NumericalError(f"{ref.name}: its compressed values are not finite", "try another format")
        full = SecondMoment()
        has_data = full in task.stats and task.n_tokens > 0
        row = Row(
            name=ref.name,
            action=fmt.name,
            reason=None,
            bytes_before=plan.bytes_before,
            bytes_after=plan.bytes_after,
            weight_error=relative_error(task.weight, decoded),
            output_error=relative_error(task.weight, decoded, task.second_moment(full)) if has_data else None,
            tokens=task.n_tokens,
        )
        self.skeleton.part(ref.param, ref.where).copy_(decoded)
        packed = fmt.pack(decision.codes, decision.qparams)
        return row, {f"{ref.module}.{suffix}": tensor for suffix, tensor in packed.tensors.items()}

    def _outside(self, before: Unit) -> Unit:
        """Copy everything that lies in no block, tensor by tensor: embeddings can be large."""
        layers = self.plan.in_block(OUTSIDE)
        rows = [Row(m.ref.name, "kept", m.kept_because, m.bytes_before, m.bytes_after) for m in layers]
        for layer in layers:
            self.sink.write(self.source.read([layer.ref.name]))
        unit_hash = self.sink.unit_hash(self._unit_tensors(OUTSIDE))
        assert unit_hash is not None
        return Unit("outside the blocks", unit_hash, rows, [], before.probe, before.streams)


class _Outside:
    """Keeps the weights outside the blocks resident inside a `with`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # Text passes by the towers of a multimodal model: their weights are copied, never run.
        self.layers = [layer for layer in engine.plan.in_block(OUTSIDE) if layer.ref.part is None]

    def __enter__(self) -> None:
        self.engine.skeleton.load(self.engine.source.read(layer.ref.name for layer in self.layers))

    def __exit__(self, *_: object) -> None:
        self.engine.skeleton.free({layer.ref.param for layer in self.layers})
        gc.collect()
