"""Runs a sealed plan unit by unit; see the package."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import kv_cache, precision
from compressor.calibration.capture import Capture
from compressor.calibration.coverage import Coverage
from compressor.calibration.operands import OperandWatch
from compressor.calibration.stats import Statistic
from compressor.calibration.store import Boundary, HiddenStore
from compressor.checkpoint import operands
from compressor.checkpoint.attention import as_products
from compressor.checkpoint.blocks import BlockSequence, Recording, example_inputs
from compressor.checkpoint.read_ahead import ReadAhead
from compressor.checkpoint.sink import WORK, Journal, Sink
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, Source
from compressor.decision import Outcome
from compressor.engine.chunks import ExpertChunks, refuse_chunks, solve_in_chunks
from compressor.engine.contents import Contents
from compressor.engine.experts import find_routers, routers_of, rule_of
from compressor.engine.memory import MARGIN, Needs
from compressor.engine.outside import Outside
from compressor.engine.rounding import InputRounding
from compressor.engine.solver import BlockOf, Solved, Solver
from compressor.engine.streams import CARRIED, COMPRESSED, FP, Streams
from compressor.errors import NumericalError, ResourceError, UnsupportedError
from compressor.folding import Folding, folded_rows
from compressor.formats import get_format
from compressor.formats.activations import get_input_format
from compressor.formats.base import QuantFormat
from compressor.methods.base import Block, Layer, Method, RouterMethod, Scope, Stream, SurveyMethod
from compressor.methods.learning import LearningOptions
from compressor.methods.operands import OperandMethod, covering
from compressor.methods.rounding import InputMethod
from compressor.methods.scaling import FoldingMethod
from compressor.plan import OUTSIDE, Kind, LayerPlan, Operand, Plan
from compressor.process import release_memory, rss
from compressor.pruning.view import ModelView, SearchMethod
from compressor.ranks import ALONE, Ranks
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
        self.min_expert_tokens, self.ranks, self.max_memory = min_expert_tokens, ranks, max_memory
        self.plan, self.source, self.skeleton, self.blocks = plan, source, skeleton, blocks
        self.method, self.progress = method, progress
        self.read_ahead = ReadAhead(source)
        dtype = DTYPES[plan.default_dtype]
        self._formats = {key: get_format(key[0], key[1], dtype) for key in plan.formats}
        self._refs = {layer.ref.name: layer.ref for layer in plan.layers}
        wanted = [spec for fmt in self._formats.values() for spec in method.stats(fmt)]
        if plan.inputs and isinstance(method, InputMethod):
            wanted += method.input_stats(get_input_format(plan.inputs))
        self.specs = tuple(dict.fromkeys(wanted))
        self.device = skeleton.device
        self.work = out / WORK
        self.contents = Contents(plan, self.format_of)
        self.outside = Outside(plan, source, skeleton, self.format_of, progress)
        self.sink = Sink(out, self.contents.slots())
        self.journal = Journal(self.work / "journal.jsonl")
        # A quantized cache is calibrated on real keys and values even if the method needs no data.
        self.attention = plan.operand_format(Operand.QUERY_KEY)
        carried = CARRIED[method.stream] or ((FP,) if plan.operand_format(Operand.KV_CACHE) else ())
        if (needs_ranges(plan) or self.attention) and COMPRESSED not in carried:
            carried = (*carried, COMPRESSED)  # what the layers of the result will meet
        hidden = self.work / "hidden"
        widest = max((fmt.bits for fmt in self._formats.values()), default=0)
        context = precision.products(self.device, widest)
        self.pieces = 1
        if tokens is not None and isinstance(options := getattr(method, "options", None), LearningOptions):
            if tokens.is_floating_point():
                options.check_images()
            else:
                window = options.window_of(widest, tokens.shape[1])
                self.pieces = tokens.shape[1] // window
                tokens, reserve = tokens.reshape(-1, window), None if reserve is None else reserve.reshape(-1, window)
        used = (tokens, reserve) if carried else (None, None)
        self.streams = Streams(hidden, carried, blocks, used[0], self.device, context, used[1], ranks)
        self.tokens, self.seed = tokens, seed
        self.events: list[str] = []
        self.probe_store = HiddenStore(hidden, "probe", self.device)
        self.solver = Solver(method, skeleton, self.format_of, seed, ranks)
        if self.attention:
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
        start = Unit("start", "", [], [], None if done else self._save_probe(0, hidden), entering)
        current = done[-1] if done else self.ranks.share(start)
        for index in range(len(done), len(self.plan.blocks)):
            started = time.monotonic()
            current = self._commit(self._block(index, current, recording), done, started)
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
            capture = self._capture(layers, specs)
            if capture:
                streams.observe(index, entering, capture)
            rounding = InputRounding(self.skeleton, (), DTYPES[self.plan.default_dtype])
            solver.solve(layers, capture, tensors, self._block_of(index, {}, {}, rounding))
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

    def _block(self, index: int, before: Unit, recording: Recording) -> Unit:
        """Compress one block and write it; `recording` holds its arguments for the probe."""
        layers = self.plan.in_block(index)
        if experts := self._in_chunks(index, layers):
            with experts.attached():
                return self._block_in_chunks(index, before, recording, experts)
        tensors = self.source.read(layer.ref.name for layer in layers)
        self.skeleton.load(tensors)
        if index + 1 < len(self.plan.blocks):
            self.read_ahead.hint(layer.ref.name for layer in self.plan.in_block(index + 1))
        streams: dict[str, Boundary] = {}
        capture = self._capture(layers, self.specs)
        ranges = {
            name: kv_cache.KVRange(self.skeleton.model.get_submodule(name), lambda: self.streams.on_reserve)
            for name in self.plan.cached(index)
        }
        counted = capture or self._count_experts(layers)
        behind = self.method.stream in (Stream.COMPRESSED, Stream.BOTH)  # statistics are those of the compressed prefix
        if FP in self.streams.stores and capture is None:
            behind = False  # counting alone is worth no pass of its own
        if FP in self.streams.stores:
            streams[FP] = self.streams.advance(index, FP, before.streams, None if behind else counted)
        if behind and counted:
            self.streams.observe(index, before.streams, counted)
        # Fixed here: whatever runs through the block from now on is no calibration data.
        for seen in ranges.values():
            seen.join(self.ranks)
        scales = {name: seen.scales(name, DTYPES[self.plan.default_dtype]) for name, seen in ranges.items()}
        folded = self._fold(index, before, recording, capture, tensors)
        rounding = InputRounding(self.skeleton, layers, DTYPES[self.plan.default_dtype])
        # What is learned is learned with the scales that will be stored; others follow from the decided weights.
        learned = self.method.scope is Scope.BLOCK
        reaches = self._reaches(index, before, rounding) if learned else None
        block_of = self._block_of(index, before.streams, streams, rounding, reaches)
        solved = self.solver.solve(layers, capture, {**tensors, **folded.rewrites}, block_of)
        rewrites = {**folded.rewrites, **self._round_routers(layers, capture, solved)}
        for name in scales:
            solved.packed.update(self._quantize_cache(name, scales[name]))
        reaches = reaches if learned else self._reaches(index, before, rounding)
        solved.packed.update(rounding.attach(solved.inputs, reaches, solved.packed))
        if self.attention:
            solved.packed.update(self._round_operands(index, before.streams))
        if COMPRESSED in self.streams.stores:
            streams[COMPRESSED] = self.streams.advance(index, COMPRESSED, before.streams, None)
        rounding.join(self.ranks)
        solved.rows, saturated = rounding.report(solved.rows)
        probe = self._probe(index, before, recording) if self.ranks.leads else None
        rounding.detach()
        unit_hash = self.sink.write(solved.packed) if self.ranks.leads else ""
        self.skeleton.free({layer.ref.param for layer in layers})
        rows = folded_rows(solved.rows, layers, self.plan, rewrites)
        topped_up: list[str] = []
        if counted:
            rows = [self._with_routed(row, counted.coverage) for row in rows]
            topped_up = counted.coverage.events()
            topped_up += [] if capture else counted.coverage.short_of(self.min_expert_tokens, self.method.name)
            solved.metrics.update(counted.coverage.metrics())
        events = [*topped_up, *folded.events, *solved.events, *saturated]
        saved = None if probe is None else self._save_probe(index + 1, probe)
        del tensors, solved.packed, capture, counted
        gc.collect()
        return Unit(self.plan.blocks[index], unit_hash, rows, events, saved, streams, solved.metrics)

    def _in_chunks(self, index: int, layers: tuple[LayerPlan, ...]) -> ExpertChunks | None:
        """Return the experts of a block that is larger than what it may take, or None if all of it may be in memory.

        Raises:
            ResourceError: It is too large, and cannot be cut.
        """
        if self.max_memory is None:
            return None
        release_memory()
        seq_len = PROBE_TOKENS if self.tokens is None else max(self.tokens.shape[1], PROBE_TOKENS)
        top_k = getattr(self.skeleton.model.config.get_text_config(), "num_experts_per_tok", None) or 1
        needs = Needs.of(layers, self.specs, seq_len * top_k)
        free, name = self.max_memory * (1 - MARGIN) - rss(), self.plan.blocks[index]
        if needs.whole <= free:
            return None
        if reason := self._refuse_chunks(index, layers) or refuse_chunks(layers, self.skeleton):
            raise ResourceError(
                f"{name}: needs {needs.whole / 1e9:.2f} GB, {(needs.whole - free) / 1e9:.2f} GB more than --max-memory "
                f"leaves, and cannot be cut: {reason}",
                "raise --max-memory",
            )
        chosen = (self.solver.unpacked, self.contents.of_layer, needs.at_once(free, name))
        return ExpertChunks(layers, self.skeleton, self.source, self.sink, *chosen)

    def _refuse_chunks(self, index: int, layers: tuple[LayerPlan, ...]) -> str | None:
        """Return why this run cannot take experts in chunks, or None."""
        reasons = {
            "the method decides whole blocks": self.method.scope not in (Scope.LAYER, Scope.GROUP),
            "several processes share it": self.ranks.size > 1,
            "the inputs of its layers are rounded": any(layer.steps for layer in layers),
            "factors are moved in it": any(fold.block == index for fold in self.plan.folds),
            "its routers are rounded": self._rounds_routers,
            "its attention is compressed too": bool(self.plan.cached(index) or self.attention),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _block_in_chunks(self, index: int, before: Unit, recording: Recording, experts: ExpertChunks) -> Unit:
        """Compress one block and write it, with some of its experts in memory at a time."""
        layers = self.plan.in_block(index)
        tensors = self.source.read(layer.ref.name for layer in layers if layer.ref.name not in experts.names)
        self.skeleton.load(tensors)
        streams: dict[str, Boundary] = {}
        if FP in self.streams.stores:
            streams[FP] = self.streams.advance(index, FP, before.streams, None)
        seen = COMPRESSED if self.method.stream in (Stream.COMPRESSED, Stream.BOTH) else FP

        def statistics(some: Sequence[LayerPlan]) -> Capture | None:
            capture = self._capture(tuple(some), self.specs, among=layers)
            if capture:
                self.streams.observe(index, before.streams, capture, seen)
            return capture

        solved, coverage = solve_in_chunks(layers, experts, tensors, self.solver, statistics)
        if COMPRESSED in self.streams.stores:
            streams[COMPRESSED] = self.streams.advance(index, COMPRESSED, before.streams, None)
        probe = self._save_probe(index + 1, self._probe(index, before, recording))
        experts.clear()
        self.skeleton.free({layer.ref.param for layer in layers if layer.ref.name not in experts.names})
        unit_hash = self.sink.unit_hash(self.contents.of_unit(index))
        assert unit_hash is not None
        rows = [self._with_routed(row, coverage) for row in solved.rows] if coverage.routed else solved.rows
        metrics = {**solved.metrics, **coverage.metrics(), "expert_chunks": len(experts.chunks())}
        events = [*coverage.events(), *solved.events]
        return Unit(self.plan.blocks[index], unit_hash, rows, events, probe, streams, metrics)

    def _with_routed(self, row: Row, coverage: Coverage) -> Row:
        """Say of an expert's weight how many calibration tokens the router sends to it."""
        ref = self._refs[row.name]
        return (
            row if ref.where.expert is None else replace(row, routed=coverage.routed.get((ref.owner, ref.where.expert)))
        )

    def _reaches(self, index: int, before: Unit, rounding: InputRounding) -> Capture | None:
        """Return how far the inputs of the block as it now is reach, if static scales must cover them."""
        ranges = rounding.ranges(self.min_expert_tokens, self.ranks)
        if ranges:
            self.streams.observe(index, before.streams, ranges)
        return ranges

    def _probe(self, index: int, before: Unit, recording: Recording) -> Tensor:
        """Run the probe through the compressed block.

        Raises:
            NumericalError: What leaves it is not finite.
        """
        assert before.probe is not None
        with torch.no_grad():
            probe = self.blocks.run(index, self.probe_store.read(before.probe, 0), recording)
        if not torch.isfinite(probe).all():
            raise NumericalError(
                f"{self.plan.blocks[index]}: its compressed output is not finite", "try another format"
            )
        return probe

    def _fold(
        self, index: int, before: Unit, recording: Recording, capture: Capture | None, tensors: Mapping[str, Tensor]
    ) -> Outcome:
        """Let the method move factors between the operations of a block, if it does such a thing."""
        folds = tuple(fold for fold in self.plan.folds if fold.block == index)
        if not folds:
            return Outcome({})
        assert before.probe is not None
        assert isinstance(self.method, FoldingMethod), f"the plan has folds, but {self.method.name} moves no factors"
        layers = {layer.ref.name: layer for layer in self.plan.in_block(index)}
        probe = self.probe_store.read(before.probe, 0)
        folding = Folding(self.method, self.skeleton, layers, self.format_of, capture, tensors)
        with torch.no_grad():
            return folding.carry_out(
                folds, lambda: self.blocks.run(index, probe, recording), probe, self.plan.blocks[index]
            )

    def _quantize_cache(self, name: str, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let an attention module compute with a quantized cache from now on."""
        module = self.skeleton.model.get_submodule(name)
        for suffix, scale in scales.items():
            module.register_buffer(suffix, scale, persistent=False)
        kv_cache.simulate(module)
        return {f"{name}.{suffix}": scale.cpu() for suffix, scale in scales.items()}

    def _round_operands(self, index: int, before: Mapping[str, Boundary]) -> dict[str, Tensor]:
        """Let the block's attention modules round their operands from now on; returns what they store.

        Raises:
            UnsupportedError: A module computes attention in a way of its own.
        """
        assert self.attention is not None
        modules = {name: self.skeleton.model.get_submodule(name) for name in self.plan.rounded_attention(index)}
        watches = {name: OperandWatch() for name in modules}
        for name, module in modules.items():
            operands.treat(module, watches[name])
        self.streams.watch(index, before)
        bits, out = get_input_format(self.attention).bits, {}
        for name, module in modules.items():
            if not watches[name].kept:
                raise UnsupportedError(
                    f"{name} ({type(module).__name__}): its operands cannot be seen", "leave --attention out"
                )
            ops = covering(watches[name], bits, name)
            if isinstance(self.method, OperandMethod):
                ops = self.method.solve_operands(watches[name], bits)
            out[f"{name}.{operands.SUFFIX}"] = values = operands.stored(ops)
            module.register_buffer(operands.SUFFIX, values.to(self.device), persistent=False)
            operands.simulate(module, name, bits)
        return out

    def _save_probe(self, boundary: int, hidden: Tensor) -> Boundary | None:
        """Write the probe's states, if this process is the one that writes."""
        if not self.ranks.leads:
            return None
        with self.probe_store.writer(boundary) as writer:
            writer.append(hidden)
            return writer.close()

    def _capture(
        self, layers: tuple[LayerPlan, ...], specs: tuple[Statistic, ...], among: tuple[LayerPlan, ...] | None = None
    ) -> Capture | None:
        """Prepare accumulators, one per tensor that compressed layers read; routers are looked for `among` layers."""
        if not specs:
            return None
        widths, modules = {}, {}
        for layer in layers:
            if layer.format and layer.ref.matrix:
                widths[layer.ref.fed_by] = layer.ref.matrix[1]
                modules[layer.ref.fed_by] = self.skeleton.model.get_submodule(layer.ref.param.rpartition(".")[0])
            elif self._rounds_routers and layer.ref.kind is Kind.ROUTER and layer.ref.matrix:
                widths[layer.ref.fed_by] = layer.ref.matrix[1]
                modules[layer.ref.fed_by] = self.skeleton.model.get_submodule(layer.ref.owner)
            if layer.ref.fed_by in widths and "#" in layer.ref.fed_by:
                modules[layer.ref.fed_by] = self.skeleton.model.get_submodule(layer.ref.fed_by.partition("#")[0])
        coverage, routers = Coverage(self.min_expert_tokens), find_routers(among or layers, self.skeleton)
        # What is folded, and a router that is rounded, every process changes for itself.
        by_all = self._rounds_routers or any(fold.block == layers[0].ref.block for fold in self.plan.folds)
        keepers = {} if by_all else self.solver.division(layers).keepers
        return Capture(widths, modules, specs, self.device, coverage, routers, self.ranks, keepers)

    def _count_experts(self, layers: tuple[LayerPlan, ...]) -> Capture | None:
        """Prepare counting the tokens of experts for a method that looks at data but wants no statistics."""
        stacks = {layer.ref.fed_by: layer.ref.owner for layer in layers if layer.format and layer.ref.role}
        if self.method.stream is Stream.NONE or not stacks:
            return None
        widths = dict.fromkeys(stacks, 0)
        modules = {fed_by: self.skeleton.model.get_submodule(stack) for fed_by, stack in stacks.items()}
        return Capture(widths, modules, (), self.device, ranks=self.ranks)

    @property
    def _rounds_routers(self) -> bool:
        return isinstance(self.method, RouterMethod) and self.method.router_bits > 0

    def _round_routers(
        self, layers: tuple[LayerPlan, ...], capture: Capture | None, solved: Solved
    ) -> dict[str, Tensor]:
        """Let the method round the block's routers; returns the rewritten tensors by name."""
        rewrites: dict[str, Tensor] = {}
        if not self._rounds_routers or capture is None:
            return rewrites
        assert isinstance(self.method, RouterMethod)
        for stack, ref in routers_of([layer.ref for layer in layers], self.skeleton).items():
            if stack not in capture.coverage.top_k:
                continue  # none of its experts is compressed
            values = self.skeleton.part(ref.param, ref.where)
            router = Layer(ref, values.detach().clone(), stats=capture.sums[ref.fed_by])
            rule, top_k = rule_of(ref, self.skeleton), capture.coverage.top_k[stack]
            own = self.skeleton.model.get_submodule(ref.owner)._parameters.get("bias")
            bias = None if own is None else own.detach()
            outcome = self.method.solve_router(router, top_k, DTYPES[ref.dtype], rule, bias)
            solved.events += outcome.events
            solved.metrics.update(outcome.metrics)
            for name, value in outcome.rewrites.items():
                self.skeleton.part(self._refs[name].param, self._refs[name].where).copy_(value)
                solved.packed[name] = value.to(solved.packed[name].device)
            rewrites |= outcome.rewrites
        return rewrites

    def _block_of(
        self,
        index: int,
        entering: Mapping[str, Boundary],
        leaving: Mapping[str, Boundary],
        rounding: InputRounding,
        ranges: Capture | None = None,
    ) -> BlockOf:
        """Return a function that shows a method its layers as one block, with what enters and what should leave it."""

        def forward(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            with as_products(self.skeleton.model):
                return self.streams.run(index, hidden, self._as_parameters(weights))

        def build(layers: Sequence[tuple[Layer, QuantFormat]]) -> Block:
            fp, compressed = self.streams.stores[FP], self.streams.stores[COMPRESSED]
            return Block(
                name=self.plan.blocks[index],
                layers=tuple(layers),
                n_samples=self.streams.n_samples,
                inputs=lambda sample: compressed.read(entering[COMPRESSED], sample),
                fp_inputs=lambda sample: fp.read(entering[FP], sample),
                targets=lambda sample: fp.read(leaving[FP], sample),
                forward=forward,
                device=self.device,
                progress=self.progress.stage,
                pieces=self.pieces,
                rounding=partial(rounding.learning, ranges),
            )

        return build

    def _as_parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn weights by tensor name into parameters by model name; experts become slices of their stack."""
        parameters: dict[str, Tensor] = {}
        for name, weight in weights.items():
            ref = self._refs[name]
            whole = self.skeleton.model.get_parameter(ref.param)
            if whole.shape == weight.shape or ref.kind is Kind.CONV:
                parameters[ref.param] = weight.view(whole.shape)
                continue
            if ref.param not in parameters:
                parameters[ref.param] = whole.detach().clone()
            ref.where.of(parameters[ref.param]).copy_(weight)
        return parameters

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
