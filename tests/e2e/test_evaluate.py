"""Evaluating a result from end to end: files, cache, refusals, the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compressor.measure.subject
from compressor import runtime
from compressor.cli.app import app
from compressor.errors import CheckpointError, RecipeError, UnsupportedError, VerificationError
from compressor.evals.activations import check_activations
from compressor.evals.baseline import Entry, entry_path, recall, remember
from compressor.evals.results import Evaluation
from compressor.formats import get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.inputs import Quantize
from compressor.measure import BASELINE_EVALUATION, EVALUATION, Evaluated, evaluate
from compressor.output import RECIPE
from compressor.report import Silent
from compressor.testing.checkpoints import write_compressed
from compressor.testing.models import tiny_bert, tiny_llama, tiny_tokenizer
from compressor.testing.tools import run_cli, save_checkpoint, write_text


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, text: str) -> None:
        self.events.append(text)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny original, its int4 version and a text; nothing in it is changed by tests."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(tiny_llama(3), folder / "tiny")
    write_compressed(tiny_llama(3), folder / "int4", get_format("int4", 64, torch.float32))
    tiny_tokenizer().save_pretrained(folder / "int4")
    (folder / "int4" / RECIPE).write_text(json.dumps({"model": str(folder / "tiny")}))
    write_text(folder / "t.txt", 900)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(shared: Path, tmp_path: Path) -> Callable[..., Evaluated]:
    def run(*tasks: str, model: str = "int4", **options: Any) -> Evaluated:
        settings: dict[str, Any] = {"text": str(shared / "t.txt"), "max_tokens": 400, "context": 64, "limit": 3}
        settings |= {"output": tmp_path / "out", "tasks": tasks or None, **options}
        return evaluate(shared / model, **settings)

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that were loaded."""
    seen: list[str] = []

    def load(path: Path, **options: Any) -> Any:
        seen.append(path.name)
        return runtime.load(path, **options)

    monkeypatch.setattr(compressor.measure.subject, "load", load)
    return seen


def without_timing(path: Path) -> str:
    data = json.loads(path.read_text())
    assert data.pop("timing")["seconds"] > 0
    return json.dumps(data)


def test_two_evaluations_differ_in_timing_alone(measured: Callable[..., Evaluated], tmp_path: Path) -> None:
    tasks = ("perplexity", "kl", "minimal-pairs")
    first = measured(*tasks)
    second = measured(*tasks, output=tmp_path / "again")
    assert [path.name for path in first.written] == [EVALUATION, BASELINE_EVALUATION]
    for name in (EVALUATION, BASELINE_EVALUATION):
        assert without_timing(tmp_path / "out" / name) == without_timing(tmp_path / "again" / name)
    assert first.baseline is not None
    assert first.baseline.timing["cached"] == []
    assert second.baseline is not None
    assert second.baseline.timing["cached"] == ["minimal-pairs"]
    for path, evaluation in zip(first.written, (first.model, first.baseline), strict=True):
        assert Evaluation.read(path) == evaluation
    assert list(first.model.tasks) == list(tasks)
    assert list(first.baseline.tasks) == ["perplexity", "minimal-pairs"]
    assert first.model.baseline == first.baseline.model
    assert first.model.model.execution_path == "reference-float32 (packed int4)"
    assert first.baseline.model.execution_path == "dense-float32"
    assert first.model.versions.keys() == {"compressor", "torch", "transformers", "lm_eval"}
    assert first.model.tasks["kl"].metrics["kl"].value > 0
    for name, task in first.baseline.tasks.items():
        assert task.samples.hash == first.model.tasks[name].samples.hash
        assert task.settings == first.model.tasks[name].settings


def test_the_same_numbers_whether_cached_or_not_and_with_or_without_kl(measured: Callable[..., Evaluated]) -> None:
    fresh = measured("perplexity", "minimal-pairs", cache=False)
    filled = measured("perplexity", "minimal-pairs")
    cached = measured("perplexity", "minimal-pairs")
    both = measured("minimal-pairs", "perplexity", "kl")
    assert fresh.baseline is not None
    assert filled.baseline is not None
    assert cached.baseline is not None
    assert (filled.baseline.timing["cached"], cached.baseline.timing["cached"]) == ([], ["perplexity", "minimal-pairs"])
    for other in (filled, cached, both):
        assert other.baseline is not None
        assert other.baseline.tasks == fresh.baseline.tasks
        assert other.baseline.model == fresh.baseline.model
        assert {name: other.model.tasks[name] for name in fresh.model.tasks} == fresh.model.tasks


def test_the_original_is_not_even_loaded_when_everything_is_cached(
    measured: Callable[..., Evaluated], loads: list[str], own_cache: Path
) -> None:
    measured("perplexity", "minimal-pairs")
    assert loads == ["tiny", "int4"]
    assert len(list(own_cache.rglob("*.json"))) == 2
    del loads[:]
    measured("minimal-pairs", "perplexity")
    assert loads == ["int4"]
    del loads[:]
    measured("perplexity", seed=1)
    measured("perplexity", max_tokens=300)
    measured("perplexity", context=50)
    measured("minimal-pairs", limit=2)
    measured("minimal-pairs", batch_size=3)
    assert loads == ["tiny", "int4"] * 5
    assert len(list(own_cache.rglob("*.json"))) == 7
    del loads[:]
    measured("perplexity", cache=False)
    assert loads == ["tiny", "int4"]
    assert len(list(own_cache.rglob("*.json"))) == 7


def test_kl_alone_runs_the_original_and_leaves_its_perplexity_in_the_cache(
    measured: Callable[..., Evaluated], loads: list[str]
) -> None:
    only = measured("kl")
    assert only.baseline is not None
    assert (list(only.model.tasks), list(only.baseline.tasks)) == (["kl"], [])
    del loads[:]
    after = measured("perplexity")
    assert loads == ["int4"]
    assert after.baseline is not None
    assert after.baseline.timing["cached"] == ["perplexity"]


def test_another_original_is_another_entry(measured: Callable[..., Evaluated], shared: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(4), tmp_path / "other")
    first = measured("perplexity")
    second = measured("perplexity", baseline=str(tmp_path / "other"))
    assert first.baseline is not None
    assert second.baseline is not None
    assert second.baseline.timing["cached"] == []
    assert first.baseline.model.fingerprint != second.baseline.model.fingerprint
    assert first.baseline.tasks["perplexity"].metrics != second.baseline.tasks["perplexity"].metrics


@pytest.mark.parametrize("damage", ["cut", "number", "key", "field"])
def test_a_damaged_entry_is_told_and_made_again(
    measured: Callable[..., Evaluated], own_cache: Path, damage: str
) -> None:
    first = measured("perplexity")
    (entry,) = own_cache.rglob("*.json")
    whole = entry.read_text()
    data = json.loads(whole)
    if damage == "number":
        data["entry"]["result"]["metrics"]["nll"]["value"] = 1.0
    elif damage == "key":
        data["entry"]["key"]["seed"] = 5
    elif damage == "field":
        del data["entry"]["result"]["samples"]
    entry.write_text(whole[:500] if damage == "cut" else json.dumps(data))
    told = Recorder()
    again = measured("perplexity", progress=told)
    assert len(told.events) == 1
    assert f"{entry}: damaged" in told.events[0]
    assert again.baseline is not None
    assert first.baseline is not None
    assert again.baseline.tasks == first.baseline.tasks
    assert entry.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_note(
    measured: Callable[..., Evaluated], own_cache: Path
) -> None:
    own_cache.write_text("a file where the folder should be")
    told = Recorder()
    measured("perplexity", progress=told)
    assert len(told.events) == 1
    assert "was not kept" in told.events[0]


def test_entries_know_what_they_are_of(measured: Callable[..., Evaluated], own_cache: Path) -> None:
    result = measured("perplexity", cache=False).model.tasks["perplexity"]
    told, key = Recorder(), {"task": "perplexity", "seed": 0}
    assert recall(key, told) is None
    remember(key, Entry(result, "here"), told)
    assert recall(key, told) == Entry(result, "here")
    assert recall({**key, "seed": 1}, told) is None
    assert told.events == []
    assert [path.name for path in entry_path(key).parent.iterdir()] == [entry_path(key).name]


def test_one_model_by_itself(measured: Callable[..., Evaluated], tmp_path: Path, own_cache: Path) -> None:
    measured("perplexity")  # leaves a baseline's file, which is not this one's
    alone = measured(model="tiny", limit=None)
    assert alone.baseline is None
    assert alone.model.baseline is None
    assert list(alone.model.tasks) == ["perplexity"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [EVALUATION]
    with pytest.raises(RecipeError, match="kl compares with a baseline"):
        measured("kl", model="tiny")


def test_what_cannot_be_evaluated(measured: Callable[..., Evaluated], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        evaluate(tmp_path / "absent")
    save_checkpoint(tiny_bert(), tmp_path / "bert")
    with pytest.raises(RecipeError, match="embeddings compares with a baseline"):
        evaluate(tmp_path / "bert", text=str(write_text(tmp_path / "t.txt", 50)), context=16)
    with pytest.raises(RecipeError, match="batch size 0"):
        measured("minimal-pairs", batch_size=0)
    assert not (tmp_path / "out").exists()


def asking(folder: Path, groups: dict[str, Any]) -> Path:
    folder.mkdir()
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return folder


def test_a_path_that_drops_activation_quantization_gives_no_score(
    measured: Callable[..., Evaluated], shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = compressor.measure.subject.check_activations

    def quantized_inputs(model: nn.Module, folder: Path) -> None:
        """Check the model that was loaded against a config that asks for more than it does."""
        real(model, asked if folder.name == "int4" else folder)

    asked = asking(tmp_path / "w4a8", {"group_0": {"weights": {}, "input_activations": {"num_bits": 8}}})
    monkeypatch.setattr(compressor.measure.subject, "check_activations", quantized_inputs)
    with pytest.raises(UnsupportedError, match=r"group_0 quantize activations, which reference-float32") as caught:
        measured("perplexity")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_which_layers_must_quantize_their_inputs(shared: Path, tmp_path: Path) -> None:
    model = runtime.load(shared / "int4")
    check_activations(model, shared / "int4")
    check_activations(model, shared / "tiny")
    inputs = {"weights": {}, "input_activations": {"num_bits": 8}}
    every = asking(tmp_path / "every", {"group_0": inputs})
    some = asking(tmp_path / "some", {"group_0": inputs, "group_1": {"weights": {}}})
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, runtime.PackedLinear)}

    def quantizing(name: str, layer: runtime.PackedLinear) -> None:
        rounding = Quantize(INPUT_FORMATS["int8-token"])
        model.set_submodule(name, runtime.PackedLinear(layer.packed, layer.fmt, inputs=[rounding]))

    for folder in (every, some):
        with pytest.raises(UnsupportedError, match="quantize activations"):
            check_activations(model, folder)
    first, *rest = layers
    quantizing(first, layers[first])
    check_activations(model, some)
    with pytest.raises(UnsupportedError, match="quantize activations"):
        check_activations(model, every)
    for name in rest:
        quantizing(name, layers[name])
    check_activations(model, every)
    native = tmp_path / "fp8"
    native.mkdir()
    (native / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedError, match=r"\(fp8\) quantize activations, which dense-float32"):
        check_activations(tiny_llama(), native)


def test_a_model_that_is_broken_is_a_broken_result(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, **options: Any) -> Any:
        model = runtime.load(path, **options)
        model.get_input_embeddings().weight[:, 0] = torch.inf
        return model

    monkeypatch.setattr(compressor.measure.subject, "load", load)
    with pytest.raises(VerificationError, match="NaN or Inf"):
        evaluate(shared / "tiny", text=str(shared / "t.txt"), max_tokens=50, context=16, output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_command_line(shared: Path, tmp_path: Path) -> None:
    small = ("--text", shared / "t.txt", "--max-tokens", 200, "--context", 64, "-o", tmp_path / "out")
    done = run_cli("eval", shared / "int4", "--tasks", "perplexity,kl,minimal-pairs", "--limit", 2, *small)
    assert done.returncode == 0, done.stderr
    assert "paired difference" in done.stdout
    assert "minimal-pairs acc" in done.stdout
    assert "loading 1 task" in done.stderr
    assert "Running" not in done.stderr + done.stdout  # what lm-eval's own progress bars say
    data = json.loads((tmp_path / "out" / EVALUATION).read_text())
    assert data["schema"] == "compressor-eval/1"
    assert len(data["tasks"]["minimal-pairs"]["samples"]["id"]) == 8
    options = [str(part) for part in ("eval", shared / "tiny", "--tasks", "kl", *small)]
    failed = CliRunner().invoke(app, options).exception
    assert isinstance(failed, RecipeError)
    assert failed.message.startswith("kl compares with a baseline")


def test_listing_tasks_and_suites() -> None:
    listed = CliRunner().invoke(app, ["eval", "--list", "--json"])
    found = json.loads(listed.stdout)
    assert {"core", "smoke"} <= found["suites"].keys()
    assert {"perplexity", "kl", "minimal-pairs"} <= found["tasks"].keys()
    table = CliRunner().invoke(app, ["eval", "--list"]).stdout
    assert "hellaswag" in table
    assert isinstance(CliRunner().invoke(app, ["eval"]).exception, RecipeError)
