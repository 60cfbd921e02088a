"""Heads and neurons removed from the command line to a smaller checkpoint, which ours and stock transformers load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.check.run import check
from compressor.cli.app import app
from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.report import Silent
from compressor.ship.card import make_card
from compressor.ship.origin import origin_of
from compressor.structured.job import StructuredReport, prune
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

QUICK = {"group": 16, "samples": 4, "window": 16, "rows": 40, "logit_rows": 16, "length": 16}


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process unless the test is about the fresh one."""
    if request.node.get_closest_marker("fresh_process") is None:
        monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.txt"))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    return save_checkpoint(model.to(torch.bfloat16), folder)


def run(source: Path, out: Path, text: str, progress: Silent | None = None, **how: object) -> StructuredReport:
    options = {**QUICK, **how.pop("options", {})}  # type: ignore[dict-item]
    how = {"macs": 0.7, **how} if "sparsity" not in how else how
    report = prune(
        str(source),
        output=out,
        data=text,
        n_samples=6,
        seq_len=32,
        options=options,
        progress=progress,
        **how,  # type: ignore[arg-type]
    )
    assert report.verification["ok"]
    return report


def kept_of(out: Path) -> dict[str, list[int]]:
    layers: dict[str, list[int]] = json.loads((out / "compress_cuts.json").read_text())["layers"]
    return layers


def test_free_layers_load_here_and_in_transformers(tmp_path: Path, text: str) -> None:
    source, out = saved(models.tiny_llama(kv_heads=2, layers=3), tmp_path / "source"), tmp_path / "out"
    report = run(source, out, text)
    before, after = report.measured["before"], report.measured["after"]
    assert 0.6 * before["macs"] < after["macs"] <= 0.7 * before["macs"]
    assert after["parameters"] < before["parameters"]
    assert not report.stock
    assert json.loads((out / "config.json").read_text())["model_type"] == "compressor_llama"
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = compressor.load(out)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = ours(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, logits)
        torch.testing.assert_close(zeroed(source, out)(tokens).logits, logits, rtol=1e-4, atol=1e-5)
        longer = theirs.generate(tokens, max_new_tokens=3, do_sample=False)
        assert torch.equal(longer[:, 9], logits[:, -1].argmax(-1))
        again = ours(longer[:, :-1]).logits[:, -1].argmax(-1)  # without a cache of keys and values
        assert torch.equal(longer[:, -1], again)
    check(out, quick=True).raise_for_errors()
    card = make_card(out, "me/cut", origin_of(out))
    assert "compress prune source --method optin --macs 0.7 --option" in card
    assert "of the multiply-adds and" in card
    assert "Calibration: 6 windows" in card
    for wrong in ("bits per", "stay packed", "- compressed-tensors\n", "decompresses"):
        assert wrong not in card
    stock = load_stock({"cut": Case(out, "float32")}, tmp_path)["cut"]
    assert stock.error is not None
    assert "compressor_llama" in stock.error


def zeroed(source: Path, out: Path) -> PreTrainedModel:
    """The original with zeros in place of what is gone: columns of the layers that read it."""
    model, stored = compressor.load(source), load_file(out / "model.safetensors")
    rows = kept_of(out)
    for index in range(3):
        prefix = f"model.layers.{index}"
        for reader, maker in (("self_attn.o_proj", "self_attn.q_proj"), ("mlp.down_proj", "mlp.up_proj")):
            stay = rows.get(f"{prefix}.{maker}")
            weight = model.get_submodule(f"{prefix}.{reader}").weight
            if stay is None:
                continue
            assert torch.equal(stored[f"{prefix}.{reader}.weight"].float(), weight[:, stay])
            assert torch.equal(
                stored[f"{prefix}.{maker}.weight"].float(), model.get_submodule(f"{prefix}.{maker}").weight[stay]
            )
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[stay] = False
            weight.data[:, gone] = 0
    return model


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen3_moe"])
def test_equal_layers_load_in_stock_transformers(kind: str, tmp_path: Path, text: str) -> None:
    """In a process without this package; a model with experts keeps them, and loses heads alone."""
    model = models.tiny_llama(kv_heads=2, layers=3) if kind == "tiny_llama" else models.tiny_qwen3_moe()
    source, out = saved(model, tmp_path / "source"), tmp_path / "out"
    report = run(source, out, text, macs=0.9, options={"layers": "equal"})
    assert report.stock
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    before = json.loads((source / "config.json").read_text())
    assert config["head_dim"] == 16
    assert config["num_attention_heads"] // config["num_key_value_heads"] == 2
    sizes = ("num_attention_heads", "intermediate_size")
    assert any(config[name] < before[name] for name in sizes)
    if kind == "tiny_qwen3_moe":
        assert any("experts stay whole" in event for event in report.events)
    stock = load_stock({"cut": Case(out, "float32")}, tmp_path)["cut"]
    assert stock.error is None
    assert not stock.wrong_keys
    with torch.no_grad():
        expected = compressor.load(out)(torch.tensor([[5, 3]])).logits
    assert stock.output is not None
    torch.testing.assert_close(stock.output.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [models.tiny_bert, models.tiny_mixtral, models.tiny_qwen2_moe])
def test_other_architectures(make, tmp_path: Path, text: str) -> None:  # type: ignore[no-untyped-def]
    source, out = saved(make(), tmp_path / "source"), tmp_path / "out"
    report = run(source, out, text, sparsity=0.1)
    assert report.measured["after"]["weights"] <= 0.9 * report.measured["before"]["weights"]
    assert report.bytes_after < report.bytes_before
    assert compressor.load(out) is not None


def test_cut_then_quantized_then_cut_is_refused(tmp_path: Path, text: str) -> None:
    source, out = saved(models.tiny_llama(kv_heads=2), tmp_path / "source"), tmp_path / "out"
    run(source, out, text)
    again = run(out, tmp_path / "again", text, macs=0.9)
    assert (
        again.measured["before"]["macs"]
        == json.loads((out / "compress_report.json").read_text())["measured"]["after"]["macs"]
    )
    small = compressor.quantize(
        str(out), method="rtn", format="int8", group_size="channel", output=tmp_path / "int8", seq_len=32
    )
    assert small.verification["ok"]
    assert small.bytes_after < 0.8 * again.bytes_before
    with pytest.raises(UnsupportedError, match="quantized"):
        run(tmp_path / "int8", tmp_path / "no", text)


class CutOff(Exception):
    """Stands for a kill."""


class Cutting(Silent):
    """Cuts the run off when the second block begins."""

    def stage(self, name: str) -> None:
        if name.startswith("block 2 of"):
            raise CutOff


def test_a_cut_off_run_continues_and_writes_the_same(tmp_path: Path, text: str) -> None:
    source = saved(models.tiny_llama(kv_heads=2), tmp_path / "source")
    run(source, tmp_path / "whole", text)
    with pytest.raises(CutOff):
        run(source, tmp_path / "cut", text, progress=Cutting())
    with pytest.raises(CheckpointError):
        compressor.load(tmp_path / "cut")
    told: list[str] = []

    class Watching(Silent):
        def stage(self, name: str) -> None:
            told.append(name)

    run(source, tmp_path / "cut", text, progress=Watching())
    assert [name.split(":")[0] for name in told if name.startswith("block")] == ["block 2 of 2"]
    assert tree_hash(tmp_path / "cut") == tree_hash(tmp_path / "whole")


@pytest.mark.fresh_process
def test_command_line(tmp_path: Path, text: str) -> None:
    source, out = saved(models.tiny_llama(kv_heads=2), tmp_path / "source"), tmp_path / "out"
    common = ["prune", str(source), "-m", "optin", "--data", text, "--n-samples", "6", "--seq-len", "32"]
    for key, value in QUICK.items():
        common += ["--option", f"{key}={value}"]
    plan = CliRunner().invoke(app, [*common, "--macs", "0.6", "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(plan.stdout)["output"].endswith("source-optin-macs60")
    assert [part["units"] for part in json.loads(plan.stdout)["parts"]] == [2, 8, 2, 8]
    result = CliRunner().invoke(app, [*common, "--sparsity", "0.3", "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    for words in ("multiply-adds of the blocks", "groups of heads left, of 2", "neurons left, of 128", "verified"):
        assert words in result.stdout
    report = json.loads((out / "compress_report.json").read_text())
    assert report["verification"]["ok"]
    assert report["measured"]["after"]["weights"] <= 0.7 * report["measured"]["before"]["weights"]


def test_what_cannot_be_is_refused_before_work(tmp_path: Path, text: str) -> None:
    source = saved(models.tiny_llama(kv_heads=2), tmp_path / "source")
    for how, words in (
        ({"macs": None}, "neither"),
        ({"macs": 0.5, "sparsity": 0.5}, "both"),
        ({"macs": 0.01}, "remain"),
        ({"options": {"group_by": "colour"}}, "group_by"),
        ({"options": {"samples": 1000}}, "1000 windows"),
        ({"skip": ["*nowhere*"]}, "matches nothing"),
        ({"method": "optim"}, "unknown method that removes heads and neurons"),
    ):
        with pytest.raises(RecipeError, match=words):
            run(source, tmp_path / "out", text, **how)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="heads and neurons"):
        compressor.quantize(str(source), method="optin")
    assert not (tmp_path / "out" / "config.json").exists()
