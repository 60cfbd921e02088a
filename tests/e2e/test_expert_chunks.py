"""Experts of a block that is larger than the memory given to it: taken some at a time, with the same result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import compressor
import compressor.verify
from compressor.api import prepare
from compressor.calibration.stats import SecondMoment
from compressor.engine import block
from compressor.engine.chunks import SparseStack
from compressor.engine.memory import MARGIN, Needs, parse_memory
from compressor.errors import RecipeError, ResourceError
from compressor.process import peak_rss, release_memory, rss
from compressor.recipe import Recipe
from compressor.report import RunReport, Silent
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

COUNTED = Needs.of


def run(source: Path, out: Path, **options: Any) -> RunReport:
    text = out.parent / "text.txt"
    if not text.exists():
        write_text(text)
    data = {"data": str(text), "n_samples": 4, "seq_len": 32}
    return compressor.quantize(str(source), output=out, **{"format": "int4", "group_size": 32, **data, **options})


def cut(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many experts fit into any memory, and no block with experts as a whole."""

    def of(layers: Sequence[Any], specs: Iterable[Any], rows: int) -> Needs:
        needs = COUNTED(layers, specs, rows)
        return (
            replace(needs, whole=10**15, dense=int(1e12 * (1 - MARGIN)) - count * needs.expert)
            if needs.expert
            else needs
        )

    monkeypatch.setattr(Needs, "of", of)
    monkeypatch.setattr(block, "rss", lambda: 0)


CASES = [
    pytest.param(models.tiny_olmoe, 1, "rtn", {}, id="olmoe-rtn"),
    pytest.param(models.tiny_olmoe, 3, "gptq", {}, id="olmoe-gptq"),
    pytest.param(models.tiny_mixtral, 3, "fp4", {"format": "mxfp4", "group_size": None}, id="mixtral-fp4"),
    pytest.param(models.tiny_qwen2_moe, 1, "gptq", {"skip": ["*.experts.*"]}, id="qwen2-gptq-experts-kept"),
    pytest.param(models.tiny_deepseek, 2, "gptq", {"format": "nvfp4", "group_size": None}, id="deepseek-gptq-nvfp4"),
]


@pytest.mark.parametrize(("build", "count", "method", "options"), CASES)
def test_the_bytes_do_not_depend_on_the_bound(
    build: Any, count: int, method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    source = save_checkpoint(build(), tmp_path / "source")
    whole = run(source, tmp_path / "whole", method=method, **options)
    cut(monkeypatch, count)
    parts = run(source, tmp_path / "parts", method=method, max_memory="1TB", **options)
    assert tree_hash(tmp_path / "whole") == tree_hash(tmp_path / "parts")
    chunks = [unit.get("expert_chunks") for unit in parts.units if any(".experts." in row.name for row in parts.rows)]
    assert -(-4 // count) in chunks
    assert not any("expert_chunks" in unit for unit in whole.units)
    assert whole.rows == parts.rows
    assert sorted(whole.events) == sorted(parts.events)


class Interrupt(Silent):
    """Ctrl-C behind the first block."""

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        raise KeyboardInterrupt


def test_a_stopped_run_goes_on_with_another_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    source = save_checkpoint(models.tiny_olmoe(), tmp_path / "source")
    run(source, tmp_path / "whole", method="gptq")
    cut(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "parts", method="gptq", max_memory="1TB", progress=Interrupt())
    cut(monkeypatch, 1)
    report = run(source, tmp_path / "parts", method="gptq", max_memory="1TB")
    assert report.resumed_at == 1
    assert [unit.get("expert_chunks") for unit in report.units] == [2, 4, None]
    assert tree_hash(tmp_path / "whole") == tree_hash(tmp_path / "parts")


def test_what_cannot_be_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    source = save_checkpoint(models.tiny_olmoe(), tmp_path / "source")
    with pytest.raises(ResourceError, match="one expert take") as little:
        run(source, tmp_path / "out", method="gptq", max_memory="10kB")
    assert little.value.hint == "raise --max-memory"
    with pytest.raises(ResourceError, match="the method decides whole blocks"):
        run(source, tmp_path / "learned", method="flexround", max_memory="10kB")
    with pytest.raises(ResourceError, match="inputs of its layers are rounded"):
        run(source, tmp_path / "inputs", method="rtn", inputs="int8-token", max_memory="10kB")
    dense = save_checkpoint(models.tiny_llama(), tmp_path / "dense")
    with pytest.raises(ResourceError, match="it has no experts"):
        run(dense, tmp_path / "llama", method="rtn", max_memory="10kB")
    assert run(source, tmp_path / "out", method="gptq", max_memory="1TB").resumed_at == 0
    with pytest.raises(RecipeError, match="no size"):
        run(source, tmp_path / "none", max_memory="6")


def test_sizes_and_needs(tmp_path: Path) -> None:
    assert parse_memory("6GB") == 6e9
    assert parse_memory("1.5 MB") == 1.5e6
    needs = Needs(whole=100, dense=20, expert=15)
    assert needs.at_once(50, "block") == 2
    assert needs.at_once(49, "block") == 1
    with pytest.raises(ResourceError, match="block"):
        needs.at_once(34, "block")
    source = save_checkpoint(models.tiny_olmoe(), tmp_path / "source")
    layers = prepare(Recipe(model=str(source), method="gptq")).plan.in_block(0)
    counted = Needs.of(layers, [SecondMoment()], rows=10)
    # An expert has three 64 x 64 matrices in float32 twice, read and kept, and two inputs of width 64.
    assert counted.expert == 3 * 64 * 64 * (4 + 4) + 2 * 64 * 64 * 4 * 2
    assert counted.whole - 4 * counted.expert < counted.dense


def test_a_stack_takes_memory_only_where_it_is_written() -> None:
    stack = SparseStack((8, 1000, 5000))  # 20 MB each
    before = rss()
    assert not stack.tensor[7].any()
    stack.tensor[2].fill_(1.0)
    stack.tensor[3].fill_(2.0)
    assert 35e6 < rss() - before < 70e6
    stack.drop(2)
    assert rss() - before < 50e6
    assert torch.equal(stack.tensor[3], torch.full((1000, 5000), 2.0))
    assert int(torch.count_nonzero(stack.tensor[2])) < 2048  # what shares a page with expert 3


class Peak(Silent):
    """Notes the most that was resident while a block was compressed."""

    def __init__(self) -> None:
        self.peak = 0
        release_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # start counting the peak anew
        except OSError:
            pytest.skip("this system does not let a process reset its peak")

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        self.peak = self.peak or peak_rss()


def test_64_experts_are_compressed_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    # One block of 64 experts: 101 MB in float32, 50 MB as stored, 168 MB of second moments.
    config = OlmoeConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        vocab_size=274,
        num_hidden_layers=1,
        num_experts=64,
        num_experts_per_tok=4,
    )
    source = save_checkpoint(models.random_model(lambda: OlmoeForCausalLM(config).bfloat16(), 0), tmp_path / "source")
    most = {}
    for name, method, room in (("whole", "rtn", 1e12), ("rtn", "rtn", 1e8), ("gptq", "gptq", 1e8)):
        watch = Peak()
        bound = rss() + room
        report = run(source, tmp_path / name, method=method, max_memory=f"{bound / 1e6:.0f}MB", progress=watch)
        most[name] = watch.peak - bound + room
        assert most[name] < room, f"{name}: {most[name] / 1e6:.0f} MB"
        assert (report.units[0].get("expert_chunks", 1) > 1) == (room < 1e9)
    assert most["whole"] > 1.4e8
    assert tree_hash(tmp_path / "whole") == tree_hash(tmp_path / "rtn")
