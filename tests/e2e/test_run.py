"""`compress run` on tiny models: steps, resume, verdicts, and that flags and YAML say the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import compressor.engine
from compressor.cli import app as cli
from compressor.errors import CheckpointError, RecipeError, ResourceError
from compressor.evals.verdict import VERDICT, read_verdict
from compressor.measure import EVALUATION
from compressor.output import RECIPE, REPORT
from compressor.ship.pipeline import RECIPES, Pipeline, build, read_pipeline, shipped
from compressor.ship.run import JOURNAL, RESOLVED, Runner, StepResult, run_pipeline
from compressor.ship.verdict import reasons_against
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

LOOSE, TIGHT = ["kl <= 5"], ["kl <= 0.0000001"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_checkpoint(tiny_llama(3), folder / "tiny")
    write_text(folder / "t.txt", 1200)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


def document(shared: Path, out: Path, *, rules: list[str] = LOOSE, **quantize: Any) -> dict[str, Any]:
    calibration = {"data": str(shared / "t.txt"), "n_samples": 4, "seq_len": 32}
    return {
        "model": str(shared / "tiny"),
        "output": str(out),
        "steps": [
            {"quantize": {"method": "gptq", "format": "int8", "calibration": calibration, **quantize}},
            {"eval": {"text": str(shared / "t.txt"), "max_tokens": 1700, "context": 32}},
            {"gate": {"rules": rules}},
        ],
    }


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["compress", *(str(word) for word in words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    done = capsys.readouterr()
    return int(caught.value.code or 0), done.out, done.err


def kept(results: tuple[StepResult, ...]) -> list[bool]:
    return [result.done.kept for result in results]


def test_steps_resume_and_verdict(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pipeline = build(document(shared, out))
    first = run_pipeline(pipeline)
    assert [result.name for result in first] == ["quantize", "eval", "gate"]
    assert kept(first) == [False, False, False]
    assert first[-1].done.passed
    assert reasons_against(out) == []
    before, scores = tree_hash(out), (out / EVALUATION).read_bytes()

    def engine(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr("compressor.api.execution.Engine", engine)
        patched.setattr("compressor.measure.evaluate", engine)
        again = run_pipeline(pipeline)
    assert kept(again) == [True, True, False]
    assert (out / EVALUATION).read_bytes() == scores
    changed = {name for name, digest in tree_hash(out).items() if before[name] != digest}
    assert changed <= {JOURNAL}

    # A setting of the evaluation changes: the checkpoint stays, the scores do not.
    more = document(shared, out)
    more["steps"][1]["eval"]["max_tokens"] = 1600
    assert kept(run_pipeline(build(more))) == [True, False, False]
    # So do scores that were tampered with, and another original under the same name.
    (out / EVALUATION).write_text((out / EVALUATION).read_text() + " ")
    assert kept(run_pipeline(build(more))) == [True, False, False]


def test_a_failed_gate_stops_and_is_remembered(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(document(shared, out, rules=TIGHT, method="rtn", format="int4")))
    code, text, _ = call(capsys, monkeypatch, "run", recipe, "--quiet")
    assert code == 3
    assert "gate failed: 1 fail" in text
    assert reasons_against(out) == ["the gate said no"]
    # The next run judges anew: with other rules the same checkpoint passes.
    code, text, _ = call(capsys, monkeypatch, "run", recipe, "--quiet", "--set", "gate.rules=['kl <= 5']", "--json")
    assert code == 0
    steps = json.loads(text)["steps"]
    assert [step["kept"] for step in steps] == [True, True, False]
    assert reasons_against(out) == []
    # Other weights than those that were judged.
    verdict = json.loads((out / VERDICT).read_text())
    verdict["model"]["fingerprint"] = "0" * 64
    (out / VERDICT).write_text(json.dumps(verdict))
    assert reasons_against(out) == [f"the verdict in {VERDICT} is about other weights"]


def test_stopped_in_the_middle(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_pipeline(build(document(shared, whole)))
    real, calls = compressor.engine.Engine._commit, []

    def commit(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        calls.append(1)
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("compressor.engine.Engine._commit", commit)
        with pytest.raises(ResourceError):
            run_pipeline(build(document(shared, cut)))
    results = run_pipeline(build(document(shared, cut)))
    assert kept(results) == [False, False, False]
    assert json.loads((cut / REPORT).read_text())["resumed_at"] == 1
    weights = "model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()


def test_another_recipe_does_not_overwrite(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_pipeline(build({**document(shared, out), "steps": document(shared, out)["steps"][:1]}))
    other = build(document(shared, out, format="int4"))
    with pytest.raises(RecipeError, match="another recipe") as caught:
        run_pipeline(other)
    assert "--force" in caught.value.hint
    (out / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        run_pipeline(build(document(shared, out)))
    results = run_pipeline(other, force=True)
    assert kept(results) == [False, False, False]
    assert reasons_against(out) == []


def test_flags_and_yaml_are_one_recipe(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shared / "t.txt"
    flags = ["--method", "rtn", "--format", "int4", "--group-size", "32", "--skip", "*.o_proj*", "--seed", "5"]
    flags += ["--set", "*.down_proj*=int8", "--option", "clip=mse", "--data", str(text), "--n-samples", "4"]
    flags += ["--seq-len", "32", "--quiet"]
    code, _, err = call(capsys, monkeypatch, "quantize", shared / "tiny", *flags, "-o", tmp_path / "flags")
    assert code == 0, err
    settings = {
        "method": "rtn",
        "format": "int4",
        "group_size": 32,
        "skip": ["*.o_proj*"],
        "set": {"*.down_proj*": "int8"},
        "options": {"clip": "mse"},
        "calibration": {"data": str(text), "n_samples": 4, "seq_len": 32},
    }
    written = tmp_path / "r.yaml"
    written.write_text(
        yaml.safe_dump(
            {
                "model": str(shared / "tiny"),
                "output": str(tmp_path / "yaml"),
                "seed": 5,
                "steps": [{"quantize": settings}],
            }
        )
    )
    assert call(capsys, monkeypatch, "run", written, "--quiet")[0] == 0
    # The same by changing a recipe's entries, by running a resolved recipe again, and by running a saved one.
    bare = tmp_path / "bare.yaml"
    bare.write_text("steps: [{quantize: {method: gptq}}]\nseed: 5\n")
    sets = [f"--set=quantize.{key}={json.dumps(value)}" for key, value in settings.items() if key != "calibration"]
    sets += [f"--set=quantize.calibration.{key}={value}" for key, value in settings["calibration"].items()]  # type: ignore[attr-defined]
    out = str(tmp_path / "yaml")
    ways = [
        read_pipeline(bare, str(shared / "tiny"), out, [change.removeprefix("--set=") for change in sets]),
        read_pipeline(tmp_path / "yaml" / RESOLVED),
        read_pipeline(tmp_path / "flags" / RECIPE, output=out),
    ]
    resolved = yaml.safe_load((tmp_path / "yaml" / RESOLVED).read_text())
    assert [yaml.safe_load(way.to_yaml()) for way in ways] == [resolved] * 3
    assert resolved["steps"][0]["quantize"]["calibration"]["split"] == "train"  # with every default
    assert (tmp_path / "flags" / RECIPE).read_text() == (tmp_path / "yaml" / RECIPE).read_text()
    assert digest_of(tmp_path / "flags") == digest_of(tmp_path / "yaml")
    assert kept(run_pipeline(ways[0])) == [True]


def digest_of(folder: Path) -> str:
    report = json.loads((folder / REPORT).read_text())
    return str(report["digest"])


def test_prune_then_quantize(shared: Path, tmp_path: Path) -> None:
    made = document(shared, tmp_path / "out")
    prune = {"pattern": "2:4", "method": "magnitude"}
    pipeline = build({**made, "steps": [{"prune": prune}, made["steps"][0], *made["steps"][1:]]})
    results = run_pipeline(pipeline)
    assert [result.name for result in results] == ["prune", "quantize", "eval", "gate"]
    saved = json.loads((tmp_path / "out" / RECIPE).read_text())
    assert saved["model"] == str(tmp_path / "out-1-prune")
    baseline = json.loads((tmp_path / "out" / EVALUATION).read_text())["baseline"]
    assert baseline["name"] == str(shared / "tiny")  # compared with the original, not with the pruned one
    assert kept(run_pipeline(pipeline)) == [True, True, True, False]


def test_recipes_of_the_package() -> None:
    assert len(shipped()) >= 6
    for name, description in shipped().items():
        assert description
        pipeline = read_pipeline(name, "smollm2-135m")
        Runner(pipeline).preflight()
        assert build(yaml.safe_load(pipeline.to_yaml())).to_yaml() == pipeline.to_yaml()
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(shipped())


STEP = {"quantize": {"method": "rtn"}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": []}, "steps: "),
    ({"steps": [STEP], "stepz": 1}, "stepz"),
    ({"steps": [{"quantise": {}}]}, "unknown step 'quantise'"),
    ({"steps": [{"quantize": {"method": "rtn"}, "eval": {}}]}, "is not one step"),
    ({"steps": [{"quantize": {"format": "int4"}}]}, "step 1, quantize: method: Field required"),
    ({"steps": [{"quantize": {"method": "rtn", "model": "x"}}]}, "model stands at the top"),
    ({"steps": [{"quantize": {"method": "rtn", "skip": "*.o_proj"}}]}, "skip is a list"),
    ({"steps": ["eval"]}, "steps that write a checkpoint come first"),
    ({"steps": ["eval", STEP]}, "steps that write a checkpoint come first"),
    ({"steps": [STEP, {"gate": {"rules": ["kl <= 1"]}}]}, "there is no eval before it"),
    ({"steps": [STEP, "eval", {"gate": {"rules": ["kl < 1"]}}]}, "is not >= or <="),
    ({"steps": [STEP, "eval", "gate"]}, "there are no rules"),
    ({"steps": [STEP, "eval", "eval"]}, "eval comes 2 times"),
    ({"steps": [STEP, {"eval": {"max_tokens": 1}}]}, "step 2, eval: max_tokens"),
    ({"steps": [{"prune": {"sparsity": 0.5}}, STEP]}, "2 steps write a checkpoint"),
    ({"version": 2, "steps": [STEP]}, "version"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_wrong_recipe_says_where(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build({"model": "m", **wrong}, "r.yaml")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantize", "is not STEP.KEY=VALUE"),
        ("quantize.=1", "is not STEP.KEY=VALUE"),
        ("push.repo=x", "is no step of this recipe"),
    ],
)
def test_a_wrong_change_says_so(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_pipeline("w8", "m", changes=[change])


def test_preflight_finds_what_would_fail_late(tmp_path: Path) -> None:
    def preflight(steps: list[Any]) -> str:
        with pytest.raises((RecipeError, CheckpointError)) as caught:
            Runner(build({"model": "m", "output": "o", "steps": steps})).preflight()
        return caught.value.message

    assert "step 1, quantize: unknown method 'gtpq'" in preflight([{"quantize": {"method": "gtpq"}}])
    assert "step 2, eval: " in preflight([STEP, {"eval": {"suite": "nothing"}}])
    missing = str(tmp_path / "none.txt")
    assert "step 3, gate: " in preflight([STEP, "eval", {"gate": {"rules_file": missing}}])


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'w4-gtpq'") as caught:
        read_pipeline("w4-gtpq")
    assert "w4-gptq" in caught.value.hint
    with pytest.raises(RecipeError, match="there is no such file"):
        read_pipeline(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="it names no model"):
        read_pipeline("w8")
    (tmp_path / "r.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="not a recipe"):
        read_pipeline(tmp_path / "r.yaml")


def test_what_speaks_against_a_folder(shared: Path, tmp_path: Path) -> None:
    assert reasons_against(shared / "tiny") == ["it holds no finished result of compress"]
    out = tmp_path / "out"
    pipeline: Pipeline = build({**document(shared, out), "steps": document(shared, out)["steps"][:1]})
    run_pipeline(pipeline)
    assert reasons_against(out) == []
    assert read_verdict(out) is None
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    assert "was changed after it was written" in reasons_against(copy)[0]
    report = json.loads((out / REPORT).read_text())
    report["verification"]["ok"] = False
    (out / REPORT).write_text(json.dumps(report))
    assert reasons_against(out) == ["it was not verified by loading it in a fresh process"]
    (out / VERDICT).write_text("{}")
    with pytest.raises(CheckpointError, match="is no verdict"):
        reasons_against(out)
