"""Runs a sealed plan unit by unit; see the package."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import precision
from compressor.calibration.store import HiddenStore
from compressor.checkpoint import operands
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.ends import example_inputs
from compressor.checkpoint.sink import WORK, Journal, Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, Source
from compressor.engine.block import BlockRunner
from compressor.engine.collecting import prepare_capture
from compressor.engine.contents import Contents
from compressor.engine.outside import Outside
from compressor.engine.parts import PROBE_TOKENS, Parts
from compressor.engine.rounding import InputRounding
from compressor.engine.solver import Solver
from compressor.engine.streams import CARRIED, COMPRESSED, FP, Streams
from compressor.engine.views import block_of
from compressor.formats import get_format
from compressor.formats.activations import get_input_format
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, Method, SurveyMethod
from compressor.methods.learning import LearningOptions
from compressor.methods.rounding import InputMethod
from compressor.plan import OUTSIDE, LayerPlan, Operand, Plan
from compressor.pruning.view import ModelView, SearchMethod
from compressor.ranks import ALONE, Ranks
from compressor.report import Progress
from compressor.unit import Unit


class Engine:
    """Runs one plan.

    Args:
        plan: A sealed plan.
        source: The checkpoint to read.
        skeleton: Its model without weights; filled and emptied here.
        blocks: Its block sequence, traced.
        method: The method.
        tokens: Calibration tokens `[n_samples, seq_len]`, or pixels `[n_samples, n, channels, height, width]`; None for
            data-free methods.
        out: The folder to write; `out/.compress-work` must exist and be ours.
        seed: Seed of the method's generators.
        progress: Who is told.
        reserve: Tokens `[n, seq_len]` of samples that only experts with too few tokens look at, or None.
        min_expert_tokens: Tokens that statistics of every expert are to rest on; 0 for any number.
        ranks: The processes that share the work. All of them run every unit; the leader alone writes the result.
        max_memory: Bytes that may be resident; experts of a block that would take more are taken some at a time.
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
        reserve: Tensor | None = None,
        min_expert_tokens: int = 0,
        ranks: Ranks = ALONE,
        max_memory: float | None = None,
    ) -> None:
        self.ranks = ranks
        self.plan, self.source, self.skeleton, self.blocks = plan, source, skeleton, blocks
        self.method, self.progress = method, progress
        dtype = DTYPES[plan.default_dtype]
        self._formats = {key: get_format(key[0], key[1], dtype) for key in plan.formats}
        wanted = [spec for fmt in self._formats.values() for spec in method.stats(fmt)]
        if plan.inputs and isinstance(method, InputMethod):
            wanted += method.input_stats(get_input_format(plan.inputs))
        self.device = skeleton.device
        self.work = out / WORK
        self.contents = Contents(plan, self.format_of)
        self.outside = Outside(plan, source, skeleton, self.format_of, progress)
        self.sink = Sink(out, self.contents.slots())
        self.journal = Journal(self.work / "journal.jsonl")
        # A quantized cache is calibrated on real keys and values even if the method needs no data.
        carried = CARRIED[method.stream] or ((FP,) if plan.operand_format(Operand.KV_CACHE) else ())
        if (needs_ranges(plan) or plan.operand_format(Operand.QUERY_KEY)) and COMPRESSED not in carried:
            carried = (*carried, COMPRESSED)  # what the layers of the result will meet
        if plan.batch_norm:
            wanted_streams = (FP, COMPRESSED) if plan.batch_norm == "correct" else (COMPRESSED,)
            carried = tuple(name for name in (FP, COMPRESSED) if name in {*carried, *wanted_streams})
        hidden = self.work / "hidden"
        widest = max((fmt.bits for fmt in self._formats.values()), default=0)
        # Statistics that are stored are those of exact products.
        context = nullcontext() if plan.batch_norm else precision.products(self.device, widest)
        pieces = 1
        if tokens is not None and isinstance(options := getattr(method, "options", None), LearningOptions):
            if tokens.is_floating_point():
                options.check_images()
            else:
                window = options.window_of(widest, tokens.shape[1])
                pieces = tokens.shape[1] // window
                tokens, reserve = tokens.reshape(-1, window), None if reserve is None else reserve.reshape(-1, window)
        used = (tokens, reserve) if carried else (None, None)
        self.streams = Streams(hidden, carried, blocks, used[0], self.device, context, used[1], ranks)
        self.tokens, self.seed = tokens, seed
        self.events: list[str] = []
        self.probe_store = HiddenStore(hidden, "probe", self.device)
        self.parts = Parts(
            plan=plan,
            refs={layer.ref.name: layer.ref for layer in plan.layers},
            source=source,
            skeleton=skeleton,
            blocks=blocks,
            method=method,
            format_of=self.format_of,
            specs=tuple(dict.fromkeys(wanted)),
            streams=self.streams,
            pieces=pieces,
            window=PROBE_TOKENS if tokens is None else max(tokens.shape[1], PROBE_TOKENS),
            probe_store=self.probe_store,
            solver=Solver(method, skeleton, self.format_of, seed, ranks),
            sink=self.sink,
            contents=self.contents,
            min_expert_tokens=min_expert_tokens,
            max_memory=max_memory,
            ranks=ranks,
            progress=progress,
        )
        self.runner = BlockRunner(self.parts)
        if plan.operand_format(Operand.QUERY_KEY):
            operands.expose(skeleton.model)

    def run(self) -> list[Unit]:
        """Run every unit that is not finished yet and return all of them; shards stay in the work folder."""
        done = self.ranks.share(self._finished() if self.ranks.leads else [])
        if self.ranks.leads:
            self.sink.allocate()
        names = [*self.plan.blocks, "outside the blocks"]
        self.progress.units(len(names), len(done))
        if len(done) == len(names) and not isinstance(self.method, SearchMethod):
            return done
        if isinstance(self.method, SurveyMethod):
            self.method.survey(self._weights)
        if isinstance(self.method, SearchMethod):
            self.events += self.method.search(self._view())
        if len(done) == len(names):
            return done
        with self.outside:
            hidden, recording = self.blocks.prologue(self.probe_inputs())
            if self.streams.stores:
                self.progress.stage("embedding calibration samples")
            entering = self.streams.enter(first=not done)
        start = Unit("start", "", [], [], None if done else self.parts.save_probe(0, hidden), entering)
        current = done[-1] if done else self.ranks.share(start)
        for index in range(len(done), len(self.plan.blocks)):
            started = time.monotonic()
            current = self._commit(self.runner.run(index, current, recording), done, started)
        started = time.monotonic()
        self._commit(self._finish(current), done, started)
        return done

    def probe_inputs(self) -> dict[str, Tensor]:
        """Return the fixed inputs whose output is compared after reloading."""
        return example_inputs(self.skeleton.model, self.device, length=PROBE_TOKENS)

    def probe_output(self, unit: Unit) -> Tensor:
        """Return the compressed model's output on the probe, float32, from the states after the last block."""
        assert unit.probe is not None
        hidden = self.probe_store.read(unit.probe, 0)
        with self.outside, torch.no_grad():
            return self.blocks.tail(hidden, self.probe_inputs()).float()

    def format_of(self, layer: LayerPlan) -> QuantFormat:
        """Return the format of a compressed layer."""
        assert layer.format is not None, layer.ref.name
        return self._formats[layer.format, layer.group_size]

    def _view(self) -> ModelView:
        """Return what a method that searches over the whole model gets to see."""
        assert self.tokens is not None, f"{self.method.name} searches, but there are no calibration tokens"
        return ModelView(
            self.plan,
            self.source,
            self.skeleton,
            self.blocks,
            self.tokens,
            self.work,
            self.seed,
            self.progress,
            self._one_shot,
        )

    def _one_shot(self, method: Method) -> None:
        """Run a LAYER method over all blocks, each behind the decided ones before it; nothing is written."""
        specs = tuple(dict.fromkeys(spec for fmt in self._formats.values() for spec in method.stats(fmt)))
        carried = CARRIED[method.stream]
        streams = Streams(
            self.work / "one-shot", carried, self.blocks, self.tokens if carried else None, self.device, nullcontext()
        )
        solver = Solver(method, self.skeleton, self.format_of, self.seed)
        with self.outside:
            entering = streams.enter(first=True)
        for index in range(len(self.plan.blocks)):
            layers = self.plan.in_block(index)
            tensors = self.source.read(layer.ref.name for layer in layers)
            self.skeleton.load(tensors)
            capture = prepare_capture(self.parts, layers, specs)
            if capture:
                streams.observe(index, entering, capture)
            rounding = InputRounding(self.skeleton, (), DTYPES[self.plan.default_dtype])
            solver.solve(layers, capture, tensors, block_of(self.parts, index, {}, {}, rounding))
            entering = {name: streams.advance(index, name, entering, None) for name in streams.stores}
            streams.drop_all_but(entering)
            self.skeleton.free({layer.ref.param for layer in layers})
        streams.drop_all_but({})

    def _weights(self) -> Iterator[tuple[Layer, QuantFormat]]:
        """Yield every compressed layer without statistics, one block in memory at a time."""
        for index in range(len(self.plan.blocks)):
            layers = self.plan.in_block(index)
            self.skeleton.load(self.source.read(layer.ref.name for layer in layers))
            for layer in layers:
                if layer.format:
                    weight = self.skeleton.part(layer.ref.param, layer.ref.where).detach().clone()
                    weight = weight.reshape(layer.ref.matrix or weight.shape)
                    yield Layer(layer.ref, weight), self.format_of(layer)
            self.skeleton.free({layer.ref.param for layer in layers})

    def _finished(self) -> list[Unit]:
        """Read the journal and check that what it says is still true; otherwise start again, and say so."""
        names = [*self.plan.blocks, "outside the blocks"]
        try:
            units = [Unit.from_json(entry) for entry in self.journal.read()]
        except ValueError:
            return self._restart("the journal of finished units is damaged")
        if len(units) > len(names):
            return self._restart("the journal has more units than the plan")
        for index, unit in enumerate(units):
            block = index if index < len(self.plan.blocks) else OUTSIDE
            if unit.name != names[index] or self.sink.unit_hash(self.contents.of_unit(block)) != unit.sha256:
                return self._restart(f"{unit.name}: what is on disk is not what was written")
        if units and len(units) < len(names):
            probe = units[-1].probe
            if probe is None or not self.probe_store.intact(probe) or not self.streams.intact(units[-1].streams):
                return self._restart("saved hidden states are damaged")
        return units

    def _restart(self, why: str) -> list[Unit]:
        self.progress.event(f"{why}: starting from the first block")
        self.journal.path.unlink()
        return []

    def _commit(self, unit: Unit, done: list[Unit], started: float) -> Unit:
        """Note that a unit is finished, and return it as the leader knows it."""
        seconds = time.monotonic() - started
        unit.metrics["seconds"] = round(seconds, 2)
        if self.ranks.leads:
            self.journal.append(asdict(unit))
        unit = self.ranks.share(unit)
        done.append(unit)
        if self.ranks.leads:  # nobody reads what is dropped: every process has closed what comes behind it
            self.probe_store.drop_all_but(unit.probe)
            self.streams.drop_all_but(unit.streams)
        errors = [row.error for row in unit.rows if row.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        if "loss_after" in unit.metrics:  # what a whole block is off by says more than its weights do
            mean = math.sqrt(unit.metrics["loss_after"])
        for event in unit.events:
            self.progress.event(event)
        self.progress.unit_done(unit.name, mean, seconds)
        return unit

    def _finish(self, before: Unit) -> Unit:
        """Write everything that lies in no block."""
        unit_hash: str | None = ""
        if self.ranks.leads:
            self.outside.write(self.sink)
            unit_hash = self.sink.unit_hash(self.contents.of_unit(OUTSIDE))
        assert unit_hash is not None
        return Unit("outside the blocks", unit_hash, self.outside.rows(), [], before.probe, before.streams)


def needs_ranges(plan: Plan) -> bool:
    """Return whether inputs have static scales that the engine must calibrate."""
    return any(layer.ranges for layer in plan.compressed)
