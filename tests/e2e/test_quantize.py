"""The whole way on tiny models: quantize, look at what is written, reload in this package and in stock transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import compressor
from compressor.checkpoint.ends import first_tensor
from compressor.errors import RecipeError
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import run_cli, save_checkpoint, tree_hash, write_text


def stock_weights(cases: dict[str, Case], scratch: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Load folders with stock transformers; every one must load, with all keys in place."""
    out = {}
    for name, loaded in load_stock(cases, scratch).items():
        assert loaded.error is None, (name, loaded.error)
        assert not loaded.wrong_keys, (name, loaded.wrong_keys)
        out[name] = loaded.weights
    return out


def quantize(model: PreTrainedModel, tmp_path: Path, **options: object) -> Path:
    tmp_path.mkdir(exist_ok=True)
    source = save_checkpoint(model, tmp_path / "source")
    report = compressor.quantize(str(source), output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert report.verification["ok"]
    assert report.verification["relative_error"] < 1e-5
    assert not (tmp_path / "out" / ".compress-work").exists()
    return tmp_path / "out"


DENSE: dict[str, dict[str, object]] = {
    "int4": {"method": "rtn", "format": "int4"},
    "int3": {"method": "rtn", "format": "int3", "group_size": 32},
    "int8-channel": {"method": "rtn", "format": "int8", "group_size": "channel"},
    "rtn-nvfp4": {"method": "rtn", "format": "nvfp4"},
    "fp4": {"method": "fp4"},
    "fp4-mxfp4": {"method": "fp4", "format": "mxfp4"},
}


def test_dense_loads_bit_equal_in_stock_transformers(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    cases, outs = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, options in DENSE.items():
            case = f"{name}-{str(dtype).removeprefix('torch.')}"
            folder = tmp_path / case
            model = models.tiny_llama(kv_heads=2).to(dtype)
            outs[case] = quantize(model, folder, data=str(text), n_samples=6, seq_len=32, **options)
            # The readers of 4-bit floats decompress to bf16 whatever the checkpoint's dtype.
            read_as = "bfloat16" if "fp4" in name or dtype is torch.bfloat16 else "float32"
            cases[case] = Case(outs[case], read_as)
    for case, theirs in stock_weights(cases, tmp_path).items():
        ours = dict(dequantized(outs[case]))
        compared = [name for name in theirs if name in ours and name.endswith("_proj.weight")]
        assert len(compared) == 2 * 7
        for name in compared:
            assert torch.equal(ours[name].to(theirs[name].dtype), theirs[name]), (case, name)


def test_experts_load_bit_equal_in_stock_transformers(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    cases, outs = {}, {}
    for build in (models.tiny_olmoe, models.tiny_mixtral, models.tiny_qwen2_moe):
        for method, format_name in (("rtn", "int4"), ("fp4", "mxfp4")):
            case = f"{build.__name__}-{format_name}"
            model = build().to(torch.bfloat16)
            outs[case] = quantize(
                model, tmp_path / case, method=method, format=format_name, data=str(text), n_samples=8, seq_len=32
            )
            cases[case] = Case(outs[case])
    for case, theirs in stock_weights(cases, tmp_path).items():
        ours = dict(dequantized(outs[case]))
        prefix = next(name for name in ours if "layers.1." in name and ".experts." in name).partition("experts.")[0]
        gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in prefix else ("gate_proj", "up_proj", "down_proj")
        for expert in range(4):
            gate_up = torch.cat([ours[f"{prefix}experts.{expert}.{name}.weight"] for name in (gate, up)]).bfloat16()
            assert torch.equal(gate_up, theirs["model.layers.1.mlp.experts.gate_up_proj"][expert]), case
            lower = ours[f"{prefix}experts.{expert}.{down}.weight"].bfloat16()
            assert torch.equal(lower, theirs["model.layers.1.mlp.experts.down_proj"][expert]), case


def test_encoder_keeps_its_biases(tmp_path: Path) -> None:
    model = models.tiny_bert()
    out = quantize(model, tmp_path, method="rtn", format="int8")
    inputs = models.sample_tokens(model)
    with torch.no_grad():
        expected = first_tensor(model(input_ids=inputs))
        got = first_tensor(compressor.load(out)(input_ids=inputs))
    assert (got - expected).norm() / expected.norm() < 0.02  # int8: close, and certainly with biases
    assert stock_weights({"bert": Case(out, "float32", "AutoModel")}, tmp_path)["bert"]


def test_output_is_smaller_and_keeps_dense_tensors_exactly(tmp_path: Path) -> None:
    model = models.tiny_llama(tied=False)
    out = quantize(model, tmp_path, method="rtn", format="int4")
    stored, original = load_file(out / "model.safetensors"), model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(stored[name], original[name])
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "compress_recipe.json"):
        assert (out / name).is_file(), name


def test_report_has_a_row_for_every_tensor(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    out = quantize(models.tiny_olmoe(), tmp_path, method="fp4", data=str(text), n_samples=4, seq_len=16)
    report = json.loads((out / "compress_report.json").read_text())
    stored = {name.removesuffix(".weight") for name in load_file(tmp_path / "source" / "model.safetensors")}
    assert {row["name"].removesuffix(".weight") for row in report["rows"]} == stored
    for row in report["rows"]:
        assert (row["action"] == "kept") == bool(row["reason"])
        if row["action"] != "kept":
            assert 0 < row["weight_error"] < 0.5
            assert row["tokens"] > 0 or any(row["name"] in event for event in report["events"])
    assert report["bits_per_weight"] == pytest.approx(4.25)


def test_same_seed_same_bytes_and_sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.txt")
    source = save_checkpoint(models.tiny_llama(layers=3), tmp_path / "source", shard_size="100KB")
    assert (source / "model.safetensors.index.json").is_file()
    for name in ("a", "b"):
        compressor.quantize(str(source), output=tmp_path / name, data=str(text), n_samples=4, seq_len=16)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
    monkeypatch.setattr("compressor.checkpoint.sink.Sink.__init__.__defaults__", (60_000,))
    compressor.quantize(str(source), output=tmp_path / "c", data=str(text), n_samples=4, seq_len=16)
    assert len(list((tmp_path / "c").glob("model-*-of-*.safetensors"))) > 2
    one, many = dict(dequantized(tmp_path / "a")), dict(dequantized(tmp_path / "c"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert stock_weights({"c": Case(tmp_path / "c")}, tmp_path)["c"]


def test_searched_scales_beat_rounding_on_the_model_itself(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = models.tiny_llama(layers=3)
    source = save_checkpoint(model, tmp_path / "source")
    errors = {}
    tokens = torch.randint(4, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    for method in ("rtn", "fp4"):
        out = tmp_path / method
        compressor.quantize(str(source), method=method, format="nvfp4", output=out, data=str(text), seq_len=64)
        with torch.no_grad():
            expected, got = model(tokens).logits, compressor.load(out)(tokens).logits
        errors[method] = float((got - expected).norm() / expected.norm())
    assert errors["fp4"] < errors["rtn"], errors


def test_finished_folder_is_not_overwritten_without_force(tmp_path: Path) -> None:
    out = quantize(models.tiny_llama(), tmp_path, method="rtn", format="int4")
    before = tree_hash(out)
    with pytest.raises(RecipeError, match="holds a finished checkpoint"):
        compressor.quantize(str(tmp_path / "source"), method="rtn", format="int8", output=out)
    assert tree_hash(out) == before
    compressor.quantize(str(tmp_path / "source"), method="rtn", format="int8", output=out, force=True)
    assert tree_hash(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="was not written by compress"):
        compressor.quantize(str(tmp_path / "source"), method="rtn", output=tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_command_line(tmp_path: Path) -> None:
    source, text = save_checkpoint(models.tiny_llama(), tmp_path / "tiny"), write_text(tmp_path / "t.txt")
    data = ("--data", text, "--n-samples", 4, "--seq-len", 16)
    plan = run_cli("quantize", source, "--dry-run", "--json", *data, cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    planned = json.loads(plan.stdout)
    assert planned["output"] == "tiny-fp4-nvfp4"
    assert not (tmp_path / "tiny-fp4-nvfp4").exists()
    done = run_cli("quantize", source, "--json", *data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["output"], report["bytes_after"]) == ("tiny-fp4-nvfp4", planned["bytes_after"])
    assert "[1/3] model.layers.0" in done.stderr
    scored = run_cli("eval", "tiny-fp4-nvfp4", "--text", text, "--max-tokens", 600, "--context", 64, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert "perplexity" in scored.stdout
    result = json.loads((tmp_path / "tiny-fp4-nvfp4" / "compress_eval.json").read_text())
    assert result["tasks"]["kl"]["metrics"]["kl"]["value"] > 0
    assert "packed nvfp4" in result["model"]["execution_path"]
    said = run_cli("generate", "tiny-fp4-nvfp4", "--prompt", "the cat", "--max-new-tokens", 4, "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert list(json.loads(said.stdout)["texts"]) == ["tiny-fp4-nvfp4"]
