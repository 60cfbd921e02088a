"""`compress auto`: expected divergences against measured ones, budgets that hold, and the whole way on a tiny model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.cli import app as cli
from compressor.errors import CompressorError, RecipeError, UnsupportedError
from compressor.formats import get_format
from compressor.output import REPORT
from compressor.recipe import CalibrationSpec, Recipe
from compressor.ship.auto import READERS, SLACK, build_format, find, parse_size
from compressor.ship.sensitivity import Seen, choices_of, expected_kl, observe
from compressor.testing.models import tiny_llama, tiny_mixtral
from compressor.testing.tools import save_checkpoint, write_text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_checkpoint(sharpened(), folder / "tiny")
    write_text(folder / "t.txt", 6000)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def sharpened(seed: int = 2) -> Any:
    """A random model whose predictions are not flat, and whose first `down_proj` matters more than the second."""
    model: Any = tiny_llama(seed, tied=False, layers=2)
    with torch.no_grad():
        model.lm_head.weight *= 8
        model.model.layers[0].mlp.down_proj.weight *= 4
        model.model.layers[1].mlp.down_proj.weight *= 0.25
    return model


def divergence(before: Any, after: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        p, q = (model(tokens).logits.double().log_softmax(-1) for model in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_the_expected_divergence_is_the_measured_one(name: str) -> None:
    model = sharpened()
    tokens = torch.randint(0, 320, (24, 64), generator=torch.Generator().manual_seed(0))
    seen = observe(model, [name], tokens, rows=64, seed=1)[name]
    weight = model.get_submodule(name).weight
    assert seen.inputs.shape == (24 * 64, weight.shape[1])
    assert seen.gradients.shape == (24 * 64, weight.shape[0])
    for scale in (0.003, 0.01):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        change = scale * weight.norm() / noise.norm() * noise
        changed = copy.deepcopy(model)
        changed.get_submodule(name).weight.data += change
        assert expected_kl(seen, change) == pytest.approx(divergence(model, changed, tokens), rel=0.25)


def test_observing_is_repeatable_and_leaves_nothing() -> None:
    model = sharpened()
    tokens = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    names = ["model.layers.0.mlp.up_proj"]
    first, again = (observe(model, names, tokens, rows=8, seed=4)[names[0]] for _ in range(2))
    assert torch.equal(first.gradients, again.gradients)
    assert first.inputs.shape[0] == 16
    assert not model.get_submodule(names[0])._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_choices_have_the_bytes_they_will_take() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 96, generator=generator)
    seen = Seen(torch.randn(20, 96, generator=generator), torch.randn(20, 32, generator=generator))
    formats = {name: build_format(name, torch.bfloat16) for name in READERS["transformers"]}
    choices = {choice.format: choice for choice in choices_of(weight, seen, formats)}
    assert "int4:64" not in choices  # 96 inputs
    assert {"int4:32", "int4:channel", "int8:channel", "nvfp4"} <= set(choices)
    for name, choice in choices.items():
        packed = formats[name].pack(formats[name].encode(weight, q := formats[name].fit(weight)), q)
        assert choice.nbytes == packed.nbytes
    costs = [choices[name].cost for name in ("int2:32", "int3:32", "int4:32", "int8:channel")]
    assert costs == sorted(costs, reverse=True)


def spec(shared: Path) -> CalibrationSpec:
    return CalibrationSpec(data=str(shared / "t.txt"), n_samples=4, seq_len=32)


@pytest.mark.parametrize("bits", [3.2, 4.25, 5.0])
def test_the_budget_holds_and_is_used(shared: Path, bits: float) -> None:
    found = find(str(shared / "tiny"), f"{bits}bpw", reader="transformers", method="rtn", calibration=spec(shared))
    assert found.allocation.nbytes <= found.budget == int((bits + SLACK) * found.weights / 8)
    assert found.allocation.nbytes > 0.9 * found.budget
    assert found.allocation.cost <= min(kl for _, kl in found.alternatives.values())
    assert found.allocation.bound <= found.allocation.cost
    fused = found.allocation.chosen
    assert all(len(group.members) == 3 for group in found.groups if "q_proj" in group.name)
    down = [fused[f"model.layers.{block}.mlp.down_proj.weight"] for block in (0, 1)]
    assert down[0].nbytes >= down[1].nbytes
    assert down[0].nbytes > down[1].nbytes or bits != 4.25  # the loud one gets more


def test_what_cannot_fit_is_refused_before_anything_is_measured(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.ship.auto.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(RecipeError, match=r"smallest formats take [\d,]+ bytes .*, the budget leaves"):
        find(str(shared / "tiny"), "1bpw", reader="transformers", calibration=spec(shared))


def test_gigabytes_count_everything(shared: Path) -> None:
    found = find(str(shared / "tiny"), "230kB", reader="vllm", method="rtn", calibration=spec(shared))
    assert found.allocation.nbytes + found.dense <= 230_000
    assert {choice.format.partition(":")[0] for choice in found.allocation.chosen.values()} <= {
        "int4",
        "int8",
        "nvfp4",
        "fp8",
    }
    with pytest.raises(RecipeError, match="the budget leaves"):
        find(str(shared / "tiny"), "200kB", reader="vllm", method="rtn", calibration=spec(shared))


def test_the_method_is_the_best_in_time(shared: Path) -> None:
    def chosen(minutes: float) -> tuple[Recipe, str]:
        found = find(str(shared / "tiny"), "4.5bpw", reader="transformers", minutes=minutes, calibration=spec(shared))
        return found.recipe, found.reasons[-1]

    recipe, reason = chosen(1e6)
    assert (recipe.method, recipe.options) == ("flexround", {"scaling": "awq"})
    assert reason.startswith("method flexround with scaling=awq, about ")
    recipe, reason = chosen(0)
    assert (recipe.method, recipe.options) == ("rtn", {})
    assert reason.startswith("method rtn, about ")
    assert "flexround would take" in reason
    assert "gptq would take" in reason


def test_methods_that_do_not_take_the_format_are_passed_over(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "vllm", ("fp8",))  # neither learning a step nor compensating knows it
    monkeypatch.setattr("compressor.ship.auto.mixable", lambda groups: groups)
    found = find(str(shared / "tiny"), "9bpw", minutes=1e6, calibration=spec(shared))
    assert (found.recipe.format, found.recipe.method) == ("fp8", "rtn")
    assert "method flexround learns the step of a grid, which fp8 does not have" in found.reasons[-1]
    assert "method gptq rounds with" in found.reasons[-1]
    with pytest.raises(CompressorError, match="method gptq rounds with"):
        find(str(shared / "tiny"), "9bpw", method="gptq", calibration=spec(shared))


@pytest.mark.parametrize("text", ["", "4", "4 bits", "-1bpw", "0bpw", "2GiBs", "bpw"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)


def test_sizes() -> None:
    assert parse_size("4.25bpw") == (4.25, True)
    assert parse_size("2GB") == (2e9, False)
    assert parse_size("1.5 MB") == (1.5e6, False)


def test_what_it_does_not_do(shared: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_mixtral(), tmp_path / "moe")
    with pytest.raises(UnsupportedError, match="has experts"):
        find("moe", "4.5bpw", calibration=spec(shared))
    with pytest.raises(RecipeError, match="unknown reader"):
        find(str(shared / "tiny"), "4.5bpw", reader="vlm", calibration=spec(shared))


def test_from_the_command_line(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        flags = ["auto", shared / "tiny", "--size", "4.5bpw", "--for", "transformers", "--method", "gptq", "-q"]
        data = ["--data", shared / "t.txt", "--n-samples", "4", "--seq-len", "32", "-o", "out"]
        monkeypatch.setattr("sys.argv", ["compress", *(str(word) for word in (*flags, *data, *words))])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        done = capsys.readouterr()
        return int(caught.value.code or 0), done.out, done.err

    code, text, err = call("--dry-run")
    assert code == 0, err
    assert "chosen: " in text
    assert "expected KL" in text
    assert "method gptq with scaling=awq" in text
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    code, text, err = call("--json")
    assert code == 0, err
    data = json.loads(text)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    stored = {row["name"]: row["action"] for row in report["rows"] if row["action"] not in ("kept", "rewritten")}
    assert report["bits_per_weight"] == pytest.approx(data["bits_per_weight"])
    assert report["bits_per_weight"] <= 4.5 + SLACK
    assert "rewritten" in {row["action"] for row in report["rows"]}  # norms, by the factors
    formats = {name: choice for name, choice in data["formats"].items() if name in stored}
    assert formats
    assert all(stored[name] == choice.partition(":")[0] for name, choice in formats.items())
    assert data["steps"][1]["step"] == "eval"
    code, text, _ = call("--json")  # once more: the same choice, and nothing is computed again
    assert code == 0
    assert [step["kept"] for step in json.loads(text)["steps"]] == [True, True]


def test_every_format_of_a_reader_exists() -> None:
    for names in READERS.values():
        for name in names:
            assert build_format(name, torch.bfloat16).name == name.partition(":")[0]
    assert get_format("int4", 64, torch.bfloat16).scheme() is not None
