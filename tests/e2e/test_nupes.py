"""Power grids through the engine: learned, searched, by GPTQ, as integers for other readers, and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import compressor
from compressor.api import prepare
from compressor.check import check
from compressor.cli.app import app
from compressor.errors import RecipeError
from compressor.inspection import inspect_checkpoint
from compressor.recipe import Recipe
from compressor.report import RunReport
from compressor.runtime import dequantized, load
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text


def run(root: Path, name: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> tuple[RunReport, Path]:
    source = root / "source"
    if not source.exists():
        save_checkpoint(models.tiny_llama(layers=2).to(dtype), source)
    text = write_text(root / "text.txt")
    wanted = {"method": "nupes", "data": str(text), "n_samples": 6, "seq_len": 32, **more}
    return compressor.quantize(str(source), output=root / name, **wanted), root / name


def exponents(path: Path) -> list[float]:
    from compressor.runtime.stored import open_checkpoint, packed_modules

    source, _ = open_checkpoint(path)
    names = [f"{module}.weight_exponent" for module in sorted(packed_modules(source))]
    return [float(tensor) for tensor in source.read(names).values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_learned_codes_and_exponents_come_back_as_written(dtype: torch.dtype, tmp_path: Path) -> None:
    report, out = run(tmp_path, "out", dtype, options={"iters": 20})
    assert report.recipe["format"] == "power4"
    assert report.verification["ok"]
    assert len(set(exponents(out))) > 3
    blocks = json.loads((out / "compress_report.json").read_text())["units"][:2]
    assert all(0 < unit["loss_after"] < unit["loss_before"] for unit in blocks)
    findings = check(out, quick=True)
    assert findings.ok, findings.to_json()
    model = load(out)
    weights = dict(dequantized(out))
    tokens = models.sample_tokens(model)
    stock = models.tiny_llama(layers=2)
    stock.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-5)
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(ours(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("bits", "group"), [(2, "32"), (3, "channel"), (8, "tensor")])
def test_the_search_needs_no_data(bits: int, group: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"format": f"power{bits}", "group_size": group, "options": {"learn": False}}
    report, out = run(tmp_path, "out", data="nothing", **more)
    assert report.verification["ok"]
    assert all(row.tokens == 0 for row in report.rows)
    found = exponents(out)
    assert all(0.2 <= exponent <= 1 for exponent in found)
    if bits == 2:
        assert set(found) == {1.0}


def test_one_exponent_for_the_network_and_a_given_one(tmp_path: Path) -> None:
    options = {"learn": False, "scope": "network"}
    _, shared = run(tmp_path, "shared", options=options)
    assert len(set(exponents(shared))) == 1
    assert exponents(shared)[0] not in (0.5, 1.0)
    _, learned = run(tmp_path, "learned", options={"iters": 4, "scope": "network"})
    assert set(exponents(learned)) == set(exponents(shared))
    _, given = run(tmp_path, "given", options={"iters": 4, "exponent": 0.7})
    assert set(exponents(given)) == {float(torch.tensor(0.7))}


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    hashes = [tree_hash(run(tmp_path, name, options={"iters": 6})[1]) for name in ("a", "b")]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]


def test_gptq_on_powers(tmp_path: Path) -> None:
    """Each layer's exponent is the one the search without data finds: both look at the weights alone."""
    report, out = run(tmp_path, "gptq", method="gptq", format="power3")
    _, searched = run(tmp_path, "nupes", format="power3", options={"learn": False})
    assert report.verification["ok"]
    assert all(row.output_error is not None for row in report.rows if row.action == "power3")
    assert exponents(out) == exponents(searched)
    assert len(set(exponents(out))) > 3


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("int8", torch.bfloat16), ("int8-bytes", torch.bfloat16), ("int8", torch.float32)], ids=str
)
def test_squares_load_as_integers_everywhere(fmt: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"learn": False, "exponent": 0.5}
    _, power = run(tmp_path, "power", dtype, format="power4", group_size="channel", options=options)
    _, int8 = run(tmp_path, "int8", dtype, format=fmt, group_size="channel", options={**options, "bits": 4})
    ours, theirs = dict(dequantized(power)), dict(dequantized(int8))
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert len(theirs["model.layers.0.mlp.up_proj.weight"][0].unique()) <= 15
    model = AutoModelForCausalLM.from_pretrained(int8, dtype=dtype)  # stock: nothing in it is ours
    assert json.loads((int8 / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    packed = load(power, dtype=dtype)
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, packed(tokens).logits)


def test_impossible_integers_are_refused_before_any_work(tmp_path: Path) -> None:
    save_checkpoint(models.tiny_llama(), tmp_path / "source")
    recipe = Recipe(model=str(tmp_path / "source"), method="nupes", format="int8", options={"bits": 4, "exponent": 0.6})
    with pytest.raises(RecipeError, match=r"exponent=0\.5"):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_shows_layers_and_draws_three(tmp_path: Path) -> None:
    _, out = run(tmp_path, "out", options={"learn": False})
    found = inspect_checkpoint(out, original=tmp_path / "source", bins=60)
    assert len(found.layers) == 14
    first = found.layers[0]
    assert first.format.startswith("power4, exponent 0.")
    assert 4.2 < first.bits < 5.5
    assert first.weight_error is not None
    assert 0 < first.weight_error < 0.2
    assert len(found.drawings) == 3
    for drawing in found.drawings:
        assert sum(drawing.counts) == found.layers[0].shape[0] * found.layers[0].shape[1] or drawing.original
        assert min(drawing.grid) >= -1
        assert max(drawing.grid) == pytest.approx(1)
        assert len(drawing.grid) == 15
        *bars, marks, labels = drawing.lines(6)
        assert len(bars) == 6
        assert len(marks) == 60
        assert 11 <= marks.count("┼") <= 15
        assert labels.split() == ["-1", "0", "1"]
        middle = [line[28:32] for line in bars]
        assert any("█" in line for line in middle), "most weights lie around zero"
        assert "█" not in bars[0][:10]


def test_inspect_without_the_original(tmp_path: Path) -> None:
    _, out = run(tmp_path, "out", method="rtn", format="int3", overrides={"*.o_proj": "fp8"})
    (out / "compress_report.json").unlink()
    found = inspect_checkpoint(out, ["*.1.mlp.*"], bins=40)
    assert [layer.name.rpartition(".")[2] for layer in found.layers] == ["down_proj", "gate_proj", "up_proj"]
    assert all(layer.weight_error is None for layer in found.layers)
    for layer, drawing in zip(found.layers, found.drawings, strict=True):
        assert not drawing.original
        assert sum(drawing.counts) == pytest.approx(layer.shape[0] * layer.shape[1], rel=1e-5)
    assert inspect_checkpoint(out, ["*.o_proj"]).drawings == (), "8-bit floats have no steps to draw"
    with pytest.raises(RecipeError, match="matches no compressed layer"):
        inspect_checkpoint(out, ["*.q"])
    with pytest.raises(RecipeError, match="nothing in it is compressed"):
        inspect_checkpoint(tmp_path / "source")


def test_inspect_on_the_command_line(tmp_path: Path) -> None:
    _, out = run(tmp_path, "out", options={"learn": False})
    arguments = ["inspect", str(out), "--layer", "*.down_proj", "--baseline", str(tmp_path / "source")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "model.layers.1.mlp.down_proj: power4, exponent" in shown.output
    assert shown.output.count("┼") > 20
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert len(data["layers"]) == 2
    assert {"name", "grid", "counts", "format", "original"} == set(data["drawings"][0])
