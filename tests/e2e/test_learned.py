"""Learned rounding through the engine: streams, slices of expert stacks, what is reported, and continuing a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor import api
from compressor.decision import Outcome, Quantized
from compressor.errors import RecipeError
from compressor.methods.base import Block
from compressor.methods.flexround import FlexRound
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import RunReport
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text


def run(source: Path, out: Path, text: Path, method: str = "flexround", **more: Any) -> RunReport:
    options = {"iters": 6, **more.pop("options", {})}
    return compressor.quantize(
        str(source), method=method, output=out, data=str(text), n_samples=6, seq_len=32, options=options, **more
    )


@pytest.mark.parametrize("method", ["flexround", "adaround"])
def test_every_block_reports_its_losses_and_time(method: str, tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_llama(layers=2), tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    report = run(source, tmp_path / "out", text, method, format="int3", options={"iters": 40})
    assert report.verification["ok"]
    saved = json.loads((tmp_path / "out" / "compress_report.json").read_text())["units"]
    assert [unit["name"] for unit in saved] == ["model.layers.0", "model.layers.1", "outside the blocks"]
    for unit in saved[:2]:
        assert 0 < unit["loss_after"] < unit["loss_before"]
        assert unit["seconds"] > 0


def test_the_block_sees_the_compressed_prefix_and_the_original_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs come from the compressed blocks before; targets are what the original model has there."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    solve = FlexRound.solve_block

    def watch(self: FlexRound, block: Block, generator: torch.Generator) -> Outcome:
        seen.append((block.inputs(3), block.targets(3)))
        weights = {layer.ref.name: layer.weight for layer, _ in block.layers}
        with torch.no_grad():  # the weights it was given reproduce the original block
            assert torch.allclose(block.forward(block.fp_inputs(3), weights), block.targets(3), atol=1e-5)
        return solve(self, block, generator)

    monkeypatch.setattr(FlexRound, "solve_block", watch)
    model = models.tiny_llama(layers=3, kv_heads=2)
    source, text = save_checkpoint(model, tmp_path / "source"), write_text(tmp_path / "text.txt")
    run(source, tmp_path / "out", text, format="int8")  # up to 4 bits, products would be bfloat16
    states: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: states.__setitem__(name, output)

    handle = model.model.layers[1].register_forward_hook(note("original"))
    job = api.prepare(Recipe(model=str(source), method="flexround", calibration=spec(text)), tmp_path / "other")
    tokens = api.calibrate(job).tokens[3:4]
    with torch.no_grad():
        model(tokens)
        handle.remove()
        for name, weight in dequantized(tmp_path / "out"):
            if name.startswith("model.layers.0."):
                model.get_parameter(name).copy_(weight)
        model.model.layers[0].register_forward_hook(note("compressed"))
        model(tokens)
    inputs, targets = seen[1]
    assert torch.allclose(targets, states["original"], atol=1e-5)
    assert torch.allclose(inputs, states["compressed"], atol=1e-5)
    assert not torch.allclose(inputs, targets, atol=1e-2)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(models.tiny_llama, "int8-tensor"), (models.tiny_olmoe, "int8-token")],
    ids=["llama", "experts"],
)
def test_blocks_are_learned_with_inputs_rounded_as_the_result_rounds_them(
    build: Callable[[], Any], inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves a learned block while learning is what leaves it in the loaded result, static scales included."""
    left: list[torch.Tensor] = []
    solve = FlexRound.solve_block

    def watch(self: FlexRound, block: Block, generator: torch.Generator) -> Outcome:
        outcome = solve(self, block, generator)
        weights = {}
        for layer, fmt in block.layers:
            decision = outcome.decisions[layer.ref.name]
            assert isinstance(decision, Quantized)
            weights[layer.ref.name] = fmt.decode(decision.codes, decision.qparams)
        with torch.no_grad():
            plain = block.forward(block.inputs(1), weights)
            with block.rounding(0, torch.Generator(), {}):
                left.append(block.forward(block.inputs(1), weights))
            assert torch.equal(plain, block.forward(block.inputs(1), weights)), "the context leaves nothing behind"
        assert not torch.equal(plain, left[-1])
        return outcome

    monkeypatch.setattr(FlexRound, "solve_block", watch)
    source, text = save_checkpoint(build(), tmp_path / "source"), write_text(tmp_path / "text.txt")
    run(source, tmp_path / "out", text, format="int8", inputs=inputs, group_size=32, options={"iters": 2})
    job = api.prepare(Recipe(model=str(source), method="flexround", calibration=spec(text)), tmp_path / "other")
    tokens = api.calibrate(job).tokens[1:2]
    loaded, seen = compressor.load(tmp_path / "out"), list[torch.Tensor]()
    for layer in loaded.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        loaded(tokens)
    assert len(seen) == len(left)
    for ours, theirs in zip(left, seen, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize(
    ("format", "options", "pieces"), [("int2", {}, 2), ("int3", {}, 1), ("int3", {"window": 32}, 8)]
)
def test_two_bits_are_learned_on_short_windows_of_the_same_tokens(
    format: str, options: dict[str, Any], pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    steps = 0

    def watch(self: FlexRound, block: Block, generator: torch.Generator) -> Outcome:
        nonlocal steps
        seen.append((block.pieces, block.n_samples, block.inputs(0).shape[1]))
        forward = block.forward

        def count(*given: Any) -> torch.Tensor:
            nonlocal steps
            steps += torch.is_grad_enabled()
            return forward(*given)

        return solve(self, replace(block, forward=count), generator)

    solve = FlexRound.solve_block
    monkeypatch.setattr(FlexRound, "solve_block", watch)
    source, text = save_checkpoint(models.tiny_llama(layers=1), tmp_path / "source"), write_text(tmp_path / "text.txt")
    call: dict[str, Any] = {"data": str(text), "n_samples": 3, "seq_len": 256, "format": format}
    call |= {"group_size": 32, "options": {"iters": 2, **options}}
    compressor.quantize(str(source), method="flexround", output=tmp_path / "out", **call)
    assert seen == [(pieces, 3 * pieces, 256 // pieces)]
    assert steps == 2 * 2 * pieces, "a step takes as many tokens as ever"


def test_windows_that_do_not_divide_samples_are_refused(tmp_path: Path) -> None:
    source, text = save_checkpoint(models.tiny_llama(layers=1), tmp_path / "source"), write_text(tmp_path / "text.txt")
    with pytest.raises(RecipeError, match="window=24 does not divide samples of 32 tokens"):
        run(source, tmp_path / "out", text, format="int4", options={"window": 24})
    assert not (tmp_path / "out" / "config.json").exists()


def spec(text: Path) -> Any:
    return CalibrationSpec(data=str(text), n_samples=6, seq_len=32)


def test_experts_are_learned_in_their_stack(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_olmoe(), tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    run(source, tmp_path / "out", text, format="int4")
    compressor.quantize(str(source), method="rtn", format="int4", output=tmp_path / "rtn")
    learned, nearest = dict(dequantized(tmp_path / "out")), dict(dequantized(tmp_path / "rtn"))
    experts = [name for name in learned if ".experts." in name]
    assert experts
    assert any(not torch.equal(learned[name], nearest[name]) for name in experts)


def test_a_run_that_stops_continues_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint(models.tiny_llama(layers=3), tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    run(source, tmp_path / "whole", text, format="int4")
    solve = FlexRound.solve_block

    def stop_at_two(self: FlexRound, block: Block, generator: torch.Generator) -> Outcome:
        if block.name.endswith(".2"):
            raise KeyboardInterrupt
        return solve(self, block, generator)

    monkeypatch.setattr(FlexRound, "solve_block", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, format="int4")
    monkeypatch.undo()
    assert run(source, tmp_path / "out", text, format="int4").resumed_at == 2
    weights = [tree_hash(tmp_path / folder) for folder in ("whole", "out")]
    assert weights[0] == weights[1]
