"""Pruning the whole way on tiny models: what is written, who loads it, what composes with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import compressor
from compressor.check.run import check
from compressor.report import RunReport
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.stock import Case, load_stock
from compressor.testing.tools import run_cli, save_checkpoint, tree_hash, write_text

DATA = {"n_samples": 6, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_text(folder.parent / "text.txt")
    return save_checkpoint(models.tiny_llama(kv_heads=2).to(torch.bfloat16), folder)


def prune(source: Path, out: Path, **options: object) -> RunReport:
    options = {"data": str(source.parent / "text.txt"), **DATA, **options}
    report = compressor.prune(str(source), output=out, **options)  # type: ignore[arg-type]
    assert report.verification["ok"]
    return report


def layers(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    ("method", "how"),
    [("magnitude", {"sparsity": 0.5}), ("wanda", {"sparsity": 0.3}), ("sparsegpt", {"pattern": "2:4"})],
)
def test_zeros_are_written_dense_and_load_anywhere(
    source: Path, tmp_path: Path, method: str, how: dict[str, object]
) -> None:
    report = prune(source, tmp_path / "out", method=method, **how)
    before, after = layers(source), layers(tmp_path / "out")
    assert len(after) == 14
    share = float(how.get("sparsity", 0.5))  # type: ignore[arg-type]
    rows = {row.name: row for row in report.rows}
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        zeros = float((weight == 0).float().mean())
        assert zeros == pytest.approx(share, abs=0.02)
        assert rows[name].action == "pruned"
        assert rows[name].sparsity == pytest.approx(zeros)
        assert rows[name].pruned == pytest.approx(zeros, abs=0.01)
        if method != "sparsegpt":
            assert torch.equal(weight[weight != 0], before[name][weight != 0])
        if "pattern" in how:
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert report.sparsity == pytest.approx(share, abs=0.02)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = load_stock({"pruned": Case(tmp_path / "out", "bfloat16")}, tmp_path)["pruned"]
    assert loaded.error is None
    assert not loaded.wrong_keys
    for name, weight in after.items():
        assert torch.equal(loaded.weights[name], weight)


def published_wanda(model: PreTrainedModel, tokens: torch.Tensor, sparsity: float) -> dict[str, torch.Tensor]:
    """The published loop on a whole model in memory: masks by name, inputs behind the pruned layers."""
    model = model.float()
    masks = {}
    for index, block in enumerate(model.model.layers):
        squares: dict[str, torch.Tensor] = {}

        def watch(name: str, squares: dict[str, torch.Tensor] = squares) -> object:
            def hook(_: object, args: tuple[torch.Tensor, ...]) -> None:
                total = args[0].double().square().sum((0, 1))
                squares[name] = squares.get(name, torch.zeros_like(total)) + total

            return hook

        linears = {name: part for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)}
        handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears.items()]  # type: ignore[arg-type]
        with torch.no_grad():
            model(tokens)
        for handle in handles:
            handle.remove()
        for name, part in linears.items():
            scores = part.weight.data.double().abs() * squares[name].sqrt()
            worst = scores.argsort(dim=1, stable=True)[:, : int(scores.shape[1] * sparsity)]
            keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, worst, False)
            part.weight.data *= keep
            masks[f"model.layers.{index}.{name}.weight"] = keep
    return masks


def test_wanda_is_the_published_one_behind_pruned_blocks(source: Path, tmp_path: Path) -> None:
    from compressor.calibration.dataset import build
    from compressor.environment import load_tokenizer
    from compressor.recipe import CalibrationSpec

    prune(source, tmp_path / "out", method="wanda", sparsity=0.5)
    spec = CalibrationSpec(data=str(source.parent / "text.txt"), **DATA)  # type: ignore[arg-type]
    tokens = build(spec, load_tokenizer(source, False), 320, seed=0).tokens
    expected = published_wanda(models.tiny_llama(kv_heads=2).to(torch.bfloat16), tokens, 0.5)
    found = layers(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, keep in expected.items():
        differ = int(((found[name] != 0) != keep).sum())
        assert differ <= 2, f"{name}: {differ} of {keep.numel()}"  # near ties in float32
        assert ((found[name] != 0).sum(1) == keep.sum(1)).all()


@pytest.mark.parametrize(
    ("method", "format"),
    [("rtn", "int4"), ("gptq", "int4"), ("awq", "int4"), ("gptq", "nvfp4"), ("adaround", "int8"), ("rtn", "int4-asym")],
)
def test_masks_survive_quantization(source: Path, tmp_path: Path, method: str, format: str) -> None:
    prune(source, tmp_path / "pruned", method="wanda", sparsity=0.5)
    options = {"iters": 3} if method == "adaround" else {}
    report = compressor.quantize(
        str(tmp_path / "pruned"),
        method=method,
        format=format,
        group_size=None if format == "nvfp4" else 32,
        output=tmp_path / "out",
        data=str(source.parent / "text.txt"),
        options=options,
        **DATA,  # type: ignore[arg-type]
    )
    before, after = layers(tmp_path / "pruned"), dict(dequantized(tmp_path / "out"))
    for name, weight in before.items():
        assert not after[name][weight == 0].any(), name
    assert report.sparsity is not None
    assert report.sparsity >= 0.5


def test_sparsegpt_prunes_and_rounds_in_one_run(source: Path, tmp_path: Path) -> None:
    report = prune(source, tmp_path / "out", method="sparsegpt", pattern="2:4", format="int4", group_size=32)
    assert report.sparsity is not None
    assert 0.5 <= report.sparsity < 0.56
    assert report.bytes_after < 0.5 * report.bytes_before
    for name, weight in dequantized(tmp_path / "out"):
        if name.endswith("_proj.weight"):
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_experts_are_pruned_like_other_layers(source: Path, tmp_path: Path) -> None:
    experts = save_checkpoint(models.tiny_mixtral().to(torch.bfloat16), tmp_path / "experts")
    (tmp_path / "text.txt").write_text((source.parent / "text.txt").read_text())
    prune(experts, tmp_path / "out", method="wanda", sparsity=0.5, n_samples=8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    chosen = [name for name in tensors if ".experts." in name]
    assert len(chosen) == 2 * 4 * 3
    for name in chosen:
        assert float((tensors[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_parts_can_be_left_alone(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out", method="magnitude", skip=["*.k_proj", "*layers.0.*"])
    for name, weight in layers(tmp_path / "out").items():
        untouched = "k_proj" in name or "layers.0." in name
        assert bool((weight == 0).any()) != untouched, name


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    text = source.parent / "text.txt"
    common = ["--data", text, "--n-samples", 6, "--seq-len", 32, "-o", tmp_path / "out"]
    done = run_cli("prune", source, "--method", "wanda", "--pattern", "2:4", *common, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5)
    check(tmp_path / "out", quick=True).raise_for_errors()
    plan = run_cli("prune", source, "--method", "sparsegpt", "--sparsity", 0.6, "--dry-run", "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["output"].endswith("-sparsegpt-60")
    for arguments, words in (
        (("--method", "wandaa"), "wanda"),
        (("--macs", 0.5), "--macs"),
        (("--method", "wanda", "--format", "int4"), "prune first"),
        (("--method", "sparsegpt", "--format", "int5000"), "int5"),
        (("--pattern", "2:4", "--sparsity", 0.4), "disagree"),
        (("--pattern", "3:7"), "divides"),
    ):
        wrong = run_cli("prune", source, *arguments)
        assert wrong.returncode == 2, wrong.stderr
        assert words in wrong.stderr
        assert "Traceback" not in wrong.stderr


def test_same_seed_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune(source, tmp_path / name, method="sparsegpt", sparsity=0.5)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
