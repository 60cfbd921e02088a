"""Compresses one block after the other and writes it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.calibration import kv_cache
from compressor.calibration.capture import Capture
from compressor.calibration.coverage import Coverage
from compressor.calibration.store import Boundary
from compressor.checkpoint.blocks import Recording
from compressor.checkpoint.read_ahead import ReadAhead
from compressor.checkpoint.source import DTYPES
from compressor.decision import Outcome
from compressor.engine import batch_norm
from compressor.engine.attention import quantize_cache, round_operands
from compressor.engine.chunks import ExpertChunks, refuse_chunks, solve_in_chunks
from compressor.engine.collecting import count_experts, prepare_capture, rounds_routers
from compressor.engine.experts import routers_of, rule_of
from compressor.engine.memory import MARGIN, Needs
from compressor.engine.parts import Parts
from compressor.engine.rounding import InputRounding
from compressor.engine.scarce import scarce_experts, solve_scarce
from compressor.engine.solver import Solved
from compressor.engine.streams import COMPRESSED, FP
from compressor.engine.views import block_of
from compressor.errors import NumericalError, ResourceError
from compressor.folding import Folding, folded_rows
from compressor.formats.activations import get_attention_format
from compressor.methods.base import Layer, RouterMethod, Scope, Stream
from compressor.methods.scaling import moves_factors
from compressor.plan import LayerPlan, Operand
from compressor.process import release_memory, rss
from compressor.report import Row
from compressor.unit import Unit


class BlockRunner:
    """Compresses blocks, one in memory at a time.

    Args:
        parts: What the run works on.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._read_ahead = ReadAhead(parts.source)
        attention = parts.plan.operand_format(Operand.QUERY_KEY)
        self._attention = None if attention is None else get_attention_format(attention)

    def run(self, index: int, before: Unit, recording: Recording) -> Unit:
        """Compress one block and write it; `recording` holds its arguments for the probe."""
        parts = self._parts
        layers = parts.plan.in_block(index)
        if experts := self._in_chunks(index, layers):
            with experts.attached():
                return self._block_in_chunks(index, before, recording, experts)
        tensors = parts.source.read(layer.ref.name for layer in layers)
        parts.skeleton.load(tensors)
        if index + 1 < len(parts.plan.blocks):
            self._read_ahead.hint(layer.ref.name for layer in parts.plan.in_block(index + 1))
        streams: dict[str, Boundary] = {}
        capture = prepare_capture(parts, layers, parts.specs)
        ranges = {
            name: kv_cache.KVRange(parts.skeleton.model.get_submodule(name), lambda: parts.streams.on_reserve)
            for name in parts.plan.cached(index)
        }
        counted = capture or count_experts(parts, layers)
        behind = parts.method.stream in (Stream.COMPRESSED, Stream.BOTH)  # the compressed prefix
        if FP in parts.streams.stores and capture is None:
            behind = False  # counting alone is worth no pass of its own
        if FP in parts.streams.stores:
            streams[FP] = parts.streams.advance(index, FP, before.streams, None if behind else counted)
        if behind and counted:
            parts.streams.observe(index, before.streams, counted)
        # Fixed here: whatever runs through the block from now on is no calibration data.
        for seen in ranges.values():
            seen.join(parts.ranks)
        original = batch_norm.original_state(parts, index) if parts.plan.batch_norm == "correct" else None
        scales = {name: seen.scales(name, DTYPES[parts.plan.default_dtype]) for name, seen in ranges.items()}
        folded = self._fold(index, before, recording, capture, tensors)
        rounding = InputRounding(parts.skeleton, layers, DTYPES[parts.plan.default_dtype])
        # What is learned is learned with the scales that will be stored; others follow from the decided weights.
        learned = parts.method.scope is Scope.BLOCK
        reaches = self._reaches(index, before, rounding) if learned else None
        as_block = block_of(parts, index, before.streams, streams, rounding, reaches)
        scarce = scarce_experts(parts, layers, counted.coverage) if learned and counted else []
        aside = solve_scarce(parts, index, before.streams, layers, scarce) if scarce else Solved()
        decided = {layer.ref.name for layer in scarce}
        others = tuple(layer for layer in layers if layer.ref.name not in decided)
        solved = parts.solver.solve(others, capture, {**tensors, **folded.rewrites}, as_block)
        solved.add(aside)
        rewrites = {**folded.rewrites, **self._round_routers(layers, capture, solved)}
        for name in scales:
            solved.packed.update(quantize_cache(parts.skeleton, name, scales[name]))
        reaches = reaches if learned else self._reaches(index, before, rounding)
        solved.packed.update(rounding.attach(solved.inputs, reaches, solved.packed))
        if self._attention:
            solved.packed.update(round_operands(parts, index, self._attention, before.streams))
        if parts.plan.batch_norm:
            settled = batch_norm.settle(parts, index, before.streams, original)
            solved.packed.update(settled)
            rewrites |= settled
        if COMPRESSED in parts.streams.stores:
            streams[COMPRESSED] = parts.streams.advance(index, COMPRESSED, before.streams, None)
        rounding.join(parts.ranks)
        solved.rows, saturated = rounding.report(solved.rows)
        probe = self._probe(index, before, recording) if parts.ranks.leads else None
        rounding.detach()
        unit_hash = parts.sink.write(solved.packed) if parts.ranks.leads else ""
        parts.skeleton.free({layer.ref.param for layer in layers})
        rows = folded_rows(solved.rows, layers, parts.plan, rewrites)
        topped_up: list[str] = []
        if counted:
            rows = [self._with_routed(row, counted.coverage) for row in rows]
            topped_up = counted.coverage.events()
            solved.metrics.update(counted.coverage.metrics())
        # Two captures may have topped up the same experts.
        events = list(dict.fromkeys([*topped_up, *folded.events, *solved.events, *saturated]))
        saved = None if probe is None else parts.save_probe(index + 1, probe)
        del tensors, solved.packed, capture, counted
        gc.collect()
        return Unit(parts.plan.blocks[index], unit_hash, rows, events, saved, streams, solved.metrics)

    def _in_chunks(self, index: int, layers: tuple[LayerPlan, ...]) -> ExpertChunks | None:
        """Return the experts of a block that is larger than what it may take, or None if all of it may be in memory.

        Raises:
            ResourceError: It is too large, and cannot be cut.
        """
        parts = self._parts
        if parts.max_memory is None:
            return None
        release_memory()
        top_k = getattr(parts.skeleton.model.config.get_text_config(), "num_experts_per_tok", None) or 1
        needs = Needs.of(layers, parts.specs, parts.window * top_k)
        free, name = parts.max_memory * (1 - MARGIN) - rss(), parts.plan.blocks[index]
        if needs.whole <= free:
            return None
        if reason := self._refuse_chunks(index, layers) or refuse_chunks(layers, parts.skeleton):
            raise ResourceError(
                f"{name}: needs {needs.whole / 1e9:.2f} GB, {(needs.whole - free) / 1e9:.2f} GB more than --max-memory "
                f"leaves, and cannot be cut: {reason}",
                "raise --max-memory",
            )
        chosen = (parts.solver.unpacked, parts.contents.of_layer, needs.at_once(free, name))
        return ExpertChunks(layers, parts.skeleton, parts.source, parts.sink, *chosen)

    def _refuse_chunks(self, index: int, layers: tuple[LayerPlan, ...]) -> str | None:
        """Return why this run cannot take experts in chunks, or None."""
        parts = self._parts
        reasons = {
            "the method decides whole blocks": parts.method.scope not in (Scope.LAYER, Scope.GROUP),
            "several processes share it": parts.ranks.size > 1,
            "the inputs of its layers are rounded": any(layer.steps for layer in layers),
            "factors are moved in it": any(fold.block == index for fold in parts.plan.folds),
            "its routers are rounded": rounds_routers(parts.method),
            "its attention is compressed too": bool(parts.plan.cached(index) or self._attention),
            "its batch normalization changes": parts.plan.batch_norm is not None,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _block_in_chunks(self, index: int, before: Unit, recording: Recording, experts: ExpertChunks) -> Unit:
        """Compress one block and write it, with some of its experts in memory at a time."""
        parts = self._parts
        layers = parts.plan.in_block(index)
        tensors = parts.source.read(layer.ref.name for layer in layers if layer.ref.name not in experts.names)
        parts.skeleton.load(tensors)
        streams: dict[str, Boundary] = {}
        if FP in parts.streams.stores:
            streams[FP] = parts.streams.advance(index, FP, before.streams, None)
        seen = COMPRESSED if parts.method.stream in (Stream.COMPRESSED, Stream.BOTH) else FP

        def statistics(some: Sequence[LayerPlan]) -> Capture | None:
            capture = prepare_capture(parts, some, parts.specs, among=layers)
            if capture:
                parts.streams.observe(index, before.streams, capture, seen)
            return capture

        solved, coverage = solve_in_chunks(layers, experts, tensors, parts.solver, statistics)
        if COMPRESSED in parts.streams.stores:
            streams[COMPRESSED] = parts.streams.advance(index, COMPRESSED, before.streams, None)
        probe = parts.save_probe(index + 1, self._probe(index, before, recording))
        experts.clear()
        parts.skeleton.free({layer.ref.param for layer in layers if layer.ref.name not in experts.names})
        unit_hash = parts.sink.unit_hash(parts.contents.of_unit(index))
        assert unit_hash is not None
        rows = [self._with_routed(row, coverage) for row in solved.rows] if coverage.routed else solved.rows
        metrics = {**solved.metrics, **coverage.metrics(), "expert_chunks": len(experts.chunks())}
        events = [*coverage.events(), *solved.events]
        return Unit(parts.plan.blocks[index], unit_hash, rows, events, probe, streams, metrics)

    def _with_routed(self, row: Row, coverage: Coverage) -> Row:
        """Say of an expert's weight how many calibration tokens the router sends to it."""
        ref = self._parts.refs[row.name]
        if ref.where.expert is None:
            return row
        routed = coverage.routed.get((ref.owner, ref.where.expert))
        return replace(row, routed=routed, tokens=row.tokens or routed or 0)  # what learns has no statistics to count

    def _reaches(self, index: int, before: Unit, rounding: InputRounding) -> Capture | None:
        """Return how far the inputs of the block as it now is reach, if static scales must cover them."""
        parts = self._parts
        ranges = rounding.ranges(parts.min_expert_tokens, parts.ranks)
        if ranges:
            parts.streams.observe(index, before.streams, ranges)
        return ranges

    def _probe(self, index: int, before: Unit, recording: Recording) -> Tensor:
        """Run the probe through the compressed block.

        Raises:
            NumericalError: What leaves it is not finite.
        """
        parts = self._parts
        assert before.probe is not None
        with torch.no_grad():
            probe = parts.blocks.run(index, parts.probe_store.read(before.probe, 0), recording)
        if not torch.isfinite(probe).all():
            raise NumericalError(
                f"{parts.plan.blocks[index]}: its compressed output is not finite", "try another format"
            )
        return probe

    def _fold(
        self, index: int, before: Unit, recording: Recording, capture: Capture | None, tensors: Mapping[str, Tensor]
    ) -> Outcome:
        """Let the method move factors between the operations of a block, if it does such a thing."""
        parts = self._parts
        folds = tuple(fold for fold in parts.plan.folds if fold.block == index)
        if not folds:
            return Outcome({})
        assert before.probe is not None
        assert moves_factors(parts.method), f"the plan has folds, but {parts.method.name} moves no factors"
        layers = {layer.ref.name: layer for layer in parts.plan.in_block(index)}
        probe = parts.probe_store.read(before.probe, 0)
        folding = Folding(parts.method, parts.skeleton, layers, parts.format_of, capture, tensors)
        with torch.no_grad():
            return folding.carry_out(
                folds, lambda: parts.blocks.run(index, probe, recording), probe, parts.plan.blocks[index]
            )

    def _round_routers(
        self, layers: tuple[LayerPlan, ...], capture: Capture | None, solved: Solved
    ) -> dict[str, Tensor]:
        """Let the method round the block's routers; returns the rewritten tensors by name."""
        parts = self._parts
        rewrites: dict[str, Tensor] = {}
        if not rounds_routers(parts.method) or capture is None:
            return rewrites
        assert isinstance(parts.method, RouterMethod)
        for stack, ref in routers_of([layer.ref for layer in layers], parts.skeleton).items():
            if stack not in capture.coverage.top_k:
                continue  # none of its experts is compressed
            values = parts.skeleton.part(ref.param, ref.where)
            router = Layer(ref, values.detach().clone(), stats=capture.sums[ref.fed_by])
            rule, top_k = rule_of(ref, parts.skeleton), capture.coverage.top_k[stack]
            own = parts.skeleton.model.get_submodule(ref.owner)._parameters.get("bias")
            bias = None if own is None else own.detach()
            outcome = parts.method.solve_router(router, top_k, DTYPES[ref.dtype], rule, bias)
            solved.events += outcome.events
            solved.metrics.update(outcome.metrics)
            for name, value in outcome.rewrites.items():
                parts.skeleton.part(parts.refs[name].param, parts.refs[name].where).copy_(value)
                solved.packed[name] = value.to(solved.packed[name].device)
            rewrites |= outcome.rewrites
        return rewrites
