"""Filter pruning from the command line to a smaller checkpoint that loads, and that stock transformers refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.cli.app import app
from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.testing.models import tiny_bert
from compressor.vision.job import prune


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time one pass only, and verify in this process unless the test is about the fresh one."""
    monkeypatch.setattr("compressor.vision.job.latency", lambda model, images: 1e-3)
    if request.node.get_closest_marker("fresh_process") is None:
        monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


@pytest.fixture
def digits(tmp_path: Path) -> str:
    return str(rare_digits(tmp_path / "digits.npz"))


def saved(kind: str, folder: Path) -> str:
    tiny_classifier(kind).save_pretrained(folder / kind)
    return str(folder / kind)


def shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping


@pytest.mark.parametrize("kind", ["resnet", "regnet", "mobilenet", "convnext"])
def test_smaller_checkpoint_loads_both_ways(kind: str, tmp_path: Path, digits: str) -> None:
    out = tmp_path / "out"
    report = prune(saved(kind, tmp_path), data=digits, sparsity=0.5, output=out)
    assert report.verification["ok"]
    before, pruned = report.measured["before"], report.measured["pruned"]
    assert pruned["macs"] < 0.55 * before["macs"]
    assert pruned["bytes"] < 0.55 * before["bytes"]
    assert (out / "model.safetensors").stat().st_size < 0.65 * (
        Path(tmp_path / kind) / "model.safetensors"
    ).stat().st_size
    images = torch.rand(3, 3, 32, 32)
    ours = compressor.load(out)
    theirs, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, ours(images).logits)
    kept = json.loads((out / "compress_cuts.json").read_text())["layers"]
    stored = shapes(out)
    assert kept
    for layer, channels in kept.items():
        assert stored[f"{layer}.weight"][0] == len(channels)
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors"}


def test_what_was_loaded_can_be_trained(tmp_path: Path, digits: str) -> None:
    prune(saved("resnet", tmp_path), data=digits, sparsity=0.5, output=tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.hf_quantizer.is_trainable
    model(torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stock_transformers_raises(tmp_path: Path, digits: str) -> None:
    prune(saved("resnet", tmp_path), data=digits, sparsity=0.5, output=tmp_path / "out")
    script = (
        "import sys; from transformers import AutoModelForImageClassification as A\n"
        "assert 'compressor' not in sys.modules\n"
        "try: A.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: print('raised', 'compressor_resnet' in str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "raised True"


@pytest.mark.fresh_process
def test_command_line_to_the_table(tmp_path: Path, digits: str) -> None:
    out = tmp_path / "out"
    arguments = ["prune", saved("resnet", tmp_path), "-m", "beta-rank", "--macs", "0.5", "--data", digits]
    arguments += ["-o", str(out), "--finetune", "2", "--option", "ranking_batch=balanced", "--option", "loss=balanced"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    for text in ("balanced accuracy", "recall of 9", "finetuned", "multiply-adds"):
        assert text in result.stdout
    report = json.loads((out / "compress_report.json").read_text())
    assert report["measured"]["finetuned"]["macs"] <= 0.5 * report["measured"]["before"]["macs"]
    assert [len(report["training"]["history"]), report["training"]["epoch"]] == [2, 2]
    assert report["verification"]["ok"]


def test_same_seed_same_bytes_and_methods_differ(tmp_path: Path, digits: str) -> None:
    model = saved("resnet", tmp_path)
    runs = {"a": {}, "b": {}, "l1": {"method": "l1"}, "c": {"options": {"ratio": "in_over_out"}}}
    files = {}
    for name, extra in runs.items():
        prune(model, data=digits, sparsity=0.5, output=tmp_path / name, finetune=1, **extra)  # type: ignore[arg-type]
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["a"] == files["b"]
    assert len({files["a"], files["l1"], files["c"]}) == 3


def test_cut_twice(tmp_path: Path, digits: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prune(saved("resnet", tmp_path), data=digits, sparsity=0.5, output=first)
    report = prune(str(first), data=digits, sparsity=0.5, method="l1", output=second)
    assert report.verification["ok"]
    assert shapes(second)["resnet.embedder.embedder.convolution.weight"][0] == 4
    config = json.loads((second / "config.json").read_text())
    assert config["base_model_type"] == "resnet"
    assert config["model_type"] == "compressor_resnet"


def test_stopped_training_continues(tmp_path: Path, digits: str) -> None:
    model = saved("resnet", tmp_path)
    settings = {"data": digits, "sparsity": 0.5, "method": "l1", "finetune": 2}

    class Stop:
        def __getattr__(self, name: str) -> object:
            return lambda *_: None

        def stage(self, name: str) -> None:
            if name.startswith("epoch 1/"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, output=tmp_path / "stopped", progress=Stop(), **settings)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        compressor.load(tmp_path / "stopped")
    with pytest.raises(RecipeError, match="another recipe"):
        prune(model, output=tmp_path / "stopped", **{**settings, "seed": 1})  # type: ignore[arg-type]
    prune(model, output=tmp_path / "stopped", **settings)  # type: ignore[arg-type]
    prune(model, output=tmp_path / "whole", **settings)  # type: ignore[arg-type]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert same[0] == same[1]


def test_training_before_the_cut_is_resumed_and_reported(tmp_path: Path, digits: str) -> None:
    model = saved("resnet", tmp_path)
    settings = {"data": digits, "sparsity": 0.5, "method": "l1", "options": {"sparse_epochs": 2}}

    class Stop:
        def __getattr__(self, name: str) -> object:
            return lambda *_: None

        def stage(self, name: str) -> None:
            if name.startswith("before the cut, epoch 1/"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, output=tmp_path / "stopped", progress=Stop(), **settings)  # type: ignore[arg-type]
    again = prune(model, output=tmp_path / "stopped", **settings)  # type: ignore[arg-type]
    whole = prune(model, output=tmp_path / "whole", **settings)  # type: ignore[arg-type]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert same[0] == same[1]
    assert again.sparse == whole.sparse
    assert len(whole.sparse["history"]) == 2
    assert whole.sparse["going"][1] < 0.1 * whole.sparse["going"][0]
    assert whole.measured["sparse"]["macs"] == whole.measured["before"]["macs"] > whole.measured["pruned"]["macs"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sparsity": None}, RecipeError, "neither of --sparsity and --macs"),
        ({"macs": 0.5}, RecipeError, "both of --sparsity and --macs"),
        ({"sparsity": 1.0}, RecipeError, "sparsity"),
        ({"method": "wanda"}, RecipeError, "unknown method for vision"),
        ({"options": {"ratoi": "in_over_out"}}, RecipeError, "unknown option of beta-rank"),
        ({"options": {"ratio": "sideways"}}, RecipeError, "option ratio"),
        ({"skip": ("head*",)}, RecipeError, "matches no layer"),
        ({"data": "nothing.npz"}, CheckpointError, "nothing.npz"),
    ],
)
def test_bad_requests_leave_nothing(
    changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path, digits: str
) -> None:
    wanted = {"data": digits, "sparsity": 0.5, "output": tmp_path / "out", **changes}
    with pytest.raises(error, match=message):
        prune(saved("resnet", tmp_path), **wanted)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_models_that_classify_no_images_are_refused(tmp_path: Path, digits: str) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="no image classifier"):
        prune(str(tmp_path / "bert"), data=digits, sparsity=0.5, output=tmp_path / "out")


def test_damaged_cuts_do_not_load(tmp_path: Path, digits: str) -> None:
    out = tmp_path / "out"
    prune(saved("resnet", tmp_path), data=digits, sparsity=0.5, method="random", output=out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["cuts"]["modules"].popitem()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        compressor.load(out)


def test_plan_shows_channels_and_writes_nothing(tmp_path: Path, digits: str) -> None:
    arguments = ["prune", saved("resnet", tmp_path), "-m", "l1", "--sparsity", "0.25", "--data", digits, "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--json", "-o", str(tmp_path / "out")], catch_exceptions=False)
    clusters = json.loads(result.stdout)["clusters"]
    assert clusters["resnet.embedder.embedder.convolution"] == [16, 12]
    assert not (tmp_path / "out").exists()
