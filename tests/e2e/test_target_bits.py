"""Formats chosen for a wished size: measured, within the budget, respecting what belongs together, and loadable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import compressor
from compressor.api import make_overrides, prepare_bits
from compressor.bits import Bits
from compressor.cli.app import app
from compressor.errors import RecipeError
from compressor.priorities import parse_stages
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import RunReport
from compressor.runtime import PackedExperts
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt", 1500)
    model = models.tiny_qwen2_moe()
    for name, param in model.named_parameters():
        if "layers.0.self_attn.o_proj" in name:
            param *= 6  # errors in it are most of what leaves its block
    return save_checkpoint(model.to(torch.bfloat16), tmp_path / "source")


def chosen(source: Path, target: float, menu: tuple[str, ...] = (), by: str = "measured", **recipe: Any) -> Bits:
    spec = CalibrationSpec(data=str(source.parent / "text.txt"), n_samples=4, seq_len=32)
    wanted = Recipe(model=str(source), group_size="32", calibration=spec, **{"method": "rtn", **recipe})
    return prepare_bits(wanted, target, menu, source.parent / "unused", stages=parse_stages(by))[1]


def run(source: Path, out: Path, **settings: Any) -> RunReport:
    data = {"data": str(source.parent / "text.txt"), "n_samples": 4, "seq_len": 32, "group_size": 32}
    return compressor.quantize(str(source), output=out, **{"method": "rtn", **data, **settings})


def test_the_result_has_the_size_and_what_belongs_together_agrees(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", target_bits=4.0)
    assert 3.5 < report.bits_per_weight <= 4.0
    assert any("formats chosen for" in event for event in report.events)
    actions = {row.name: row.action for row in report.rows if row.action != "kept"}
    assert len(set(actions.values())) > 1
    assert len({action for name, action in actions.items() if ".experts." in name}) == 1  # one layer has experts
    for layer in (0, 1):
        fused = {actions[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"}
        assert len(fused) == 1
    assert not compressor.load(tmp_path / "out").training
    recipe = json.loads((tmp_path / "out" / "compress_recipe.json").read_text())
    assert {override["format"] for override in recipe["overrides"]} == set(actions.values())


def test_what_errs_most_gets_more_bits(source: Path) -> None:
    bits = chosen(source, 4.0, ("int3", "int4", "int8"))
    formats = dict(bits.formats)
    assert formats["model.layers.0.self_attn.o_proj.weight"] == "int8"
    assert "int3" in formats.values()
    assert bits.bound is not None
    assert bits.cost is not None
    assert bits.bound <= bits.cost
    assert bits.bits <= 4.0
    more = chosen(source, 6.0, ("int3", "int4", "int8"))
    assert more.cost is not None
    assert more.cost < bits.cost
    assert more.bits > bits.bits


def test_the_users_own_choices_stay(source: Path) -> None:
    own = make_overrides({"*.o_proj": "int8"}, ["*.shared_expert.*"])
    bits = chosen(source, 4.0, overrides=own)
    assert not any("o_proj" in name or "shared_expert." in name for name in bits.formats)


def test_the_same_command_chooses_the_same(source: Path, tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        run(source, tmp_path / name, target_bits=4.5)
        hashes.append(tree_hash(tmp_path / name))
    assert hashes[0] == hashes[1]


def test_experts_of_different_layers_may_differ(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", 1500)
    model = models.tiny_olmoe()
    for name, param in model.named_parameters():
        if "layers.0.mlp.experts" in name:
            param *= 3
    source = save_checkpoint(model.to(torch.bfloat16), tmp_path / "source")
    report = run(source, tmp_path / "out", target_bits=6.9, menu=("int4", "int8"), method="gptq")
    formats = {row.name.split(".")[2]: row.action for row in report.rows if ".experts." in row.name}
    assert len(set(formats.values())) == 2
    assert any("compressor.load alone reads" in event for event in report.events)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "compressor_olmoe"
    loaded = compressor.load(tmp_path / "out")
    assert sum(isinstance(module, PackedExperts) for module in loaded.modules()) == 2


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_deepseek])
def test_other_architectures(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", 1500)
    source = save_checkpoint(build(), tmp_path / "source")
    assert 4 < chosen(source, 5.0, ("int3", "int4", "int8")).bits <= 5.0


def test_refusals(source: Path) -> None:
    with pytest.raises(RecipeError, match=r"take 3\.5"):
        chosen(source, 3.0, ("int3", "int8"))
    with pytest.raises(RecipeError, match="has its format already"):
        chosen(source, 4.0, overrides=make_overrides({"*proj": "int4"}, []))
    with pytest.raises(RecipeError, match="no format of the menu suits"):
        chosen(source, 4.0, ("fp8",), method="gptq")


def test_the_command_prints_what_it_chose(source: Path, tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "text.txt"), "--n-samples", "2", "--seq-len", "32", "--group-size", "32"]
    arguments = ["quantize", str(source), "--method", "rtn", "--target-bits", "4.5", *data, "--dry-run", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "formats chosen for" in done.output
    assert "predicted squared error" in done.output
    assert not (tmp_path / "out").exists()
    wrong = CliRunner().invoke(app, ["quantize", str(source), "--menu", "int4"])
    assert isinstance(wrong.exception, RecipeError | SystemExit)


# --- by rule ---


def high(bits: Bits) -> set[str]:
    """Return the groups with the larger format, blocks as `layer.part`."""
    names = (name for name, chosen in bits.formats.items() if chosen == "int4")
    return {".".join(name.removesuffix(".weight").split(".")[2:]) for name in names}


ATTENTION = {f"{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj+k_proj+v_proj", "o_proj")}
SHARED = {f"1.mlp.shared_expert.{part}" for part in ("gate_proj+up_proj", "down_proj")}


def test_rules_spend_in_their_order(source: Path) -> None:
    """int2 and int4 in groups of 32 take 2.5 and 4.5 bits."""
    everything = high(chosen(source, 4.6, by="attention,shared,first"))
    assert everything == ATTENTION | SHARED | {"0.mlp.gate_proj+up_proj", "0.mlp.down_proj", "1.mlp.experts"}
    assert high(chosen(source, 4.5, by="attention")) == ATTENTION
    assert high(chosen(source, 4.5, by="shared")) == SHARED
    some = chosen(source, 3.1, by="attention,shared")
    assert some.bits <= 3.1
    assert high(some) < ATTENTION | SHARED
    assert {"0.self_attn.q_proj+k_proj+v_proj", "0.self_attn.o_proj"} <= high(some)
    assert some.cost is None
    assert "by rule (attention, shared)" in some.sentence()
    first = high(chosen(source, 3.3, by="first"))
    assert first
    assert all(name.startswith("0.mlp") for name in first)


def test_outliers_and_importance(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", 1500)
    model = models.tiny_olmoe()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj")[2, 0, 0] = 9
        model.get_parameter("model.layers.0.mlp.experts.down_proj").mul_(20)  # drowns the residual
    source = save_checkpoint(model.to(torch.bfloat16), tmp_path / "source")
    assert high(chosen(source, 3.4, by="outliers")) == {"1.mlp.experts"}
    assert high(chosen(source, 3.4, by="importance")) == {"0.mlp.experts"}
    report = run(source, tmp_path / "out", target_bits=3.4, bits_by="outliers")
    assert {row.action for row in report.rows if ".layers.1.mlp.experts." in row.name} == {"int4"}
    assert any("by rule (outliers)" in event for event in report.events)


def test_importance_of_an_encoder_whose_parts_are_narrower(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", 1500)
    source = save_checkpoint(models.tiny_bert(), tmp_path / "source")
    assert chosen(source, 3.5, by="attention,importance").bits <= 3.5


def test_refusals_of_rules(source: Path) -> None:
    with pytest.raises(RecipeError, match="--bits-by frequency: no such rule"):
        chosen(source, 3.5, by="frequency")
    with pytest.raises(RecipeError, match="two formats, not 3"):
        chosen(source, 4.0, ("int2", "int3", "int4"), by="attention")
    wrong = CliRunner().invoke(app, ["quantize", str(source), "--bits-by", "attention"])
    assert isinstance(wrong.exception, RecipeError | SystemExit)
