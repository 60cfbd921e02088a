"""Tables of filter pruning: a tiny one from its YAML to its page, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from compressor.errors import CheckpointError, RecipeError
from compressor.evals.bench.runner import Settings
from compressor.evals.bench.table import TABLES
from compressor.evals.bench.vision import run_vision_table
from compressor.evals.bench.vision_page import render_vision
from compressor.evals.bench.vision_table import is_vision, read_vision_table
from compressor.testing.images import rare_digits
from compressor.vision import experiment
from compressor.vision.experiment import Experiment, run
from compressor.vision_trial import rounded


def table(folder: Path, **changes: object) -> Path:
    data = rare_digits(folder / "digits.npz")
    content = {
        "kind": "vision",
        "title": "Digits",
        "file": data.name,
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "model": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "training": {"epochs": 1, "batch": 32},
        "finetune": {"epochs": 1, "batch": 32},
        "seeds": 2,
        "sparsities": [0.5],
        "formats": ["int8", "int4"],
        "against": "l1",
        "arms": [
            {"name": "l1", "method": "l1"},
            {"name": "ours", "method": "taylor", "options": {"budget": "sensitivity", "ranking_images": 32}},
        ],
        **changes,
    }
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def in_process(folder: Path, step: str, command: list[str], *rest: object) -> object:
    """Stand in for a step's process: the program itself, without starting an interpreter."""
    from compressor.evals.bench.steps import Cost

    programs = {"compressor.vision.experiment": None, "compressor.vision_trial": rounded}
    assert command[1] == "-m"
    assert experiment.main(command[3:], programs[command[2]]) == 0
    return Cost(60.0, 30.0, 10**9)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.evals.bench.vision.run_step", in_process)
    monkeypatch.setattr("compressor.vision.experiment.latency", lambda *_, **__: 1e-3)


def test_from_yaml_to_page(tmp_path: Path) -> None:
    path = table(tmp_path)
    assert is_vision(path)
    assert "0 of 2 seeds" in render_vision(path)
    settings = Settings(data=tmp_path, work=tmp_path / "work", results=tmp_path / "results" / "table")
    summary = run_vision_table(path, settings)
    assert summary.done == ("seed-0", "seed-1")
    assert run_vision_table(path, settings).kept == ("seed-0", "seed-1")
    page = render_vision(path)
    assert "| ours, 50% |" in page
    assert page == render_vision(path)
    record = json.loads(next((tmp_path / "results" / "table").glob("seed-1-*")).read_text())
    arms = record["result"]["arms"]
    dense = record["result"]["original"]["macs"]
    assert [arm["arm"]["name"] for arm in arms] == ["l1", "ours"]
    assert arms[1]["finetuned"]["macs"] <= arms[0]["finetuned"]["macs"] < 0.6 * dense
    sizes = {name: found["bytes"] for name, found in arms[0]["finetuned"]["formats"].items()}
    assert sizes["int4"] < sizes["int8"] < 0.5 * 4 * arms[0]["finetuned"]["parameters"]
    assert str(tmp_path) not in json.dumps(record)


def test_stopped_seed_continues_with_the_next_arm(tmp_path: Path) -> None:
    spec = read_vision_table(table(tmp_path)).spec(0, str(tmp_path / "digits.npz"))
    wanted = Experiment.model_validate(spec)
    result = tmp_path / "result.json"
    first = run(wanted.model_copy(update={"arms": wanted.arms[:1]}), result, told=lambda text: None)
    lines: list[str] = []
    both = run(wanted, result, told=lines.append)
    assert both["arms"][0] == first["arms"][0]
    assert run(wanted, result, told=lines.append) == both
    assert [line.partition(" ")[0] for line in lines] == ["ours"]


def test_roundings_of_the_original_and_of_what_was_cut(tmp_path: Path) -> None:
    ways = [
        {"name": "eight", "method": "rtn", "format": "int8"},
        {"name": "two", "method": "rtn", "format": "int2"},
        {"name": "learned", "method": "flexround", "format": "int4", "options": {"iters": 1}, "n_samples": 2},
    ]
    arms = [{"name": "l1", "method": "l1"}]
    wanted = read_vision_table(table(tmp_path, arms=arms, roundings=ways[:2], formats=[]))
    path, settings = tmp_path / "table.yaml", Settings(tmp_path, tmp_path / "work", tmp_path / "results" / "table")
    plain = read_vision_table(table(tmp_path, arms=arms, formats=[]))
    assert "roundings" not in plain.spec(0, "")  # what earlier tables have made stays theirs
    assert plain.folder(0) == wanted.folder(0)
    table(tmp_path, arms=arms, roundings=ways[:2], formats=[])
    run_vision_table(path, settings)
    trained = next((tmp_path / "work").glob("seed-0-*/networks/original/model.safetensors")).stat().st_mtime_ns
    table(tmp_path, arms=arms, roundings=ways, formats=[])  # one more way: the others are not made again
    run_vision_table(path, settings)
    assert trained == next((tmp_path / "work").glob("seed-0-*/networks/original/model.safetensors")).stat().st_mtime_ns
    other = read_vision_table(table(tmp_path, title="Others", finetune={"epochs": 2}))
    assert (tmp_path / "originals" / other.original(1)).is_file()  # tables that train alike need not train again
    assert not (tmp_path / "originals" / wanted.model_copy(update={"training": {}}).original(1)).exists()
    table(tmp_path, arms=arms, roundings=ways, formats=[])
    page = render_vision(path)
    assert "| original | learned | int4 |" in page
    assert "| l1, 50% | two | int2 |" in page
    key = read_vision_table(path).key(0)
    found = json.loads((tmp_path / "results" / "table" / f"{key}.json").read_text())["result"]["roundings"]
    assert [(one["network"], one["rounding"]["name"]) for one in found] == [
        (network, way["name"]) for network in ("original", "l1, 50%") for way in ways
    ]
    sizes = {(one["network"], one["rounding"]["name"]): one["bytes"] for one in found}
    assert sizes["original", "two"] < sizes["original", "learned"] < sizes["original", "eight"]
    assert all(sizes["l1, 50%", way["name"]] < sizes["original", way["name"]] for way in ways)


def test_roundings_need_the_program_that_has_the_methods(tmp_path: Path) -> None:
    spec = read_vision_table(table(tmp_path, roundings=[{"name": "a", "method": "rtn", "format": "int8"}]))
    with pytest.raises(RecipeError, match="1 roundings"):
        run(Experiment.model_validate(spec.spec(0, "digits.npz")), tmp_path / "result.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roundings": [{"name": "a", "method": "rtn", "format": "int8"}] * 2}, "roundings are a, a"),
        ({"against": "nothing"}, "against is 'nothing'"),
        ({"arms": [{"name": "l1", "method": "l1"}] * 2}, "arms are l1, l1"),
        ({"seeds": 1}, "seeds"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_vision_table(table(tmp_path, **changes))


def test_other_images_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="SHA-256"):
        run_vision_table(path, Settings(data=tmp_path, work=tmp_path / "w", results=tmp_path / "r"))


def test_the_projects_own_tables_are_sound() -> None:
    own = [path for path in sorted(TABLES.glob("*.yaml")) if is_vision(path)]
    assert own
    for path in own:
        found = read_vision_table(path)
        assert found.seeds >= 5
        if path.stem in ("vision-cells", "vision-cifar"):  # the others are about something else
            assert {"random", "l1"} <= {arm.name for arm in found.arms}
