"""The GitHub Action: valid, careful with its inputs, and its steps do what they say when a shell runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.cli import app as cli
from compressor.evals.rules import parse_rule
from compressor.measure import BASELINE_EVALUATION, EVALUATION
from compressor.testing.evaluations import evaluation, kl_task, perplexity_task
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, write_text

ROOT = Path(__file__).parents[2]
ACTION, EXAMPLE = ROOT / "action.yml", ROOT / "docs" / "examples" / "gate.yml"

STUB = """#!{python}
# Takes the place of `compress run`, which has tests of its own and takes seconds; other verbs are the real thing.
import os, shutil, sys
if sys.argv[1] == "run":
    open(os.environ["CALLS"], "a").write("\\n".join(sys.argv[2:]) + "\\n--\\n")
    out = sys.argv[sys.argv.index("--output") + 1]
    shutil.copytree(os.environ["MADE"], out)
    sys.exit(int(os.environ.get("RUN_CODE", "0")))
from compressor.cli.app import main
main()
"""


@dataclass
class Job:
    """What a job saw of the action."""

    code: int
    outputs: dict[str, str]
    summary: str
    log: str


def action() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(ACTION.read_text())
    return data


def play(tmp_path: Path, env: dict[str, str], **given: str) -> Job:
    """Run the steps as a runner does: one bash after the other, expressions filled in, until one fails."""
    data = action()
    inputs = {name: str(entry.get("default", "")) for name, entry in data["inputs"].items()} | given
    steps: dict[str, dict[str, str]] = {}
    summary, log, code = tmp_path / "summary.md", "", 0
    summary.touch()

    def fill(text: str) -> str:
        def value(found: re.Match[str]) -> str:
            place = found[1].split(".")
            return inputs[place[1]] if place[0] == "inputs" else steps.get(place[1], {}).get(place[3], "")

        return re.sub(r"\$\{\{\s*([\w.]+)\s*\}\}", value, text)

    for step in data["runs"]["steps"]:
        output, script = tmp_path / "output.txt", tmp_path / "step.sh"
        output.write_text("")
        script.write_text(step["run"])
        variables = {name: fill(str(value)) for name, value in step.get("env", {}).items()}
        files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            env={**os.environ, **env, **variables, **files}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        log += done.stdout + done.stderr
        if "id" in step:
            steps[step["id"]] = dict(line.split("=", 1) for line in output.read_text().splitlines())
        if code := done.returncode:
            break
    outputs = {name: fill(entry["value"]) for name, entry in data["outputs"].items()}
    return Job(code, outputs, summary.read_text(), log)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A PATH whose `compress` copies a result that is there, and that result."""
    made, tools = tmp_path / "made", tmp_path / "tools"
    made.mkdir()
    tools.mkdir()
    kl, nll = [0.05, 0.06] * 16, [3.0, 3.2] * 16
    new = {
        "kl": kl_task(kl),
        "perplexity": perplexity_task([value + 0.01 + 0.002 * (i % 3) for i, value in enumerate(nll)]),
    }
    base = {"perplexity": perplexity_task(nll)}
    (made / EVALUATION).write_text(json.dumps(evaluation("out", new, "original").to_json()))
    (made / BASELINE_EVALUATION).write_text(json.dumps(evaluation("original", base).to_json()))
    accepted = {
        "kl": kl_task([value - 0.01 - 0.002 * (i % 3) for i, value in enumerate(kl)]),
        "perplexity": perplexity_task(nll),
    }
    (tmp_path / "accepted.json").write_text(json.dumps(evaluation("old", accepted, "original").to_json()))
    (tools / "compress").write_text(STUB.format(python=sys.executable))
    (tools / "compress").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return {"PATH": path, "MADE": str(made), "CALLS": str(tmp_path / "calls.txt"), "OMP_NUM_THREADS": "1"}


def test_rules_that_pass(tmp_path: Path, env: dict[str, str]) -> None:
    job = play(tmp_path, env, package="", recipe="my recipe.yaml", model="m", rules="kl <= 0.1\nppl <= +5%  # loose\n")
    assert job.code == 0, job.log
    assert job.outputs == {
        "passed": "true",
        "evaluation": "compressed/compress_eval.json",
        "junit": "compressed-gate.xml",
    }
    assert (tmp_path / "calls.txt").read_text() == "my recipe.yaml\n--output\ncompressed\n--model\nm\n--\n"
    assert "gate passed: 2 pass" in job.summary
    assert (tmp_path / "compressed-gate.xml").read_text().count("<testcase") == 2


def test_rules_that_fail_the_pull_request(tmp_path: Path, env: dict[str, str]) -> None:
    job = play(tmp_path, env, package="", recipe="r", base="accepted.json", rules="kl <= +0.001")
    assert job.code == 3
    assert job.outputs["passed"] == "false"
    assert "gate failed: 1 fail" in job.summary
    job = play(tmp_path, env, package="", recipe="r", output="two", base="accepted.json", rules="kl <= +0.05")
    assert job.code == 0, job.log


def test_a_recipes_own_gate(tmp_path: Path, env: dict[str, str]) -> None:
    job = play(tmp_path, {**env, "RUN_CODE": "3"}, package="", recipe="r")
    assert job.code == 3
    assert job.outputs == {"passed": "false", "evaluation": "compressed/compress_eval.json", "junit": ""}
    job = play(tmp_path, {**env, "RUN_CODE": "3"}, package="", recipe="r", output="two", rules="kl <= 0.1")
    assert job.code == 3  # passing other rules does not undo it
    assert "gate passed" in job.summary


def test_errors_are_not_verdicts(tmp_path: Path, env: dict[str, str]) -> None:
    job = play(tmp_path, {**env, "RUN_CODE": "5"}, package="", recipe="r", rules="kl <= 0.1")
    assert job.code == 5
    assert job.outputs["passed"] == ""
    assert not job.summary
    job = play(tmp_path, env, package="", recipe="r", output="two", rules="kl < 0.1")
    assert job.code == 2
    assert "is not >= or <=" in job.log
    assert job.outputs["passed"] == ""


def test_inconclusive_under_strict(tmp_path: Path, env: dict[str, str]) -> None:
    rules = "kl <= 0.055"  # the mean: nobody can say
    assert play(tmp_path, env, package="", recipe="r", rules=rules).code == 0
    assert play(tmp_path, env, package="", recipe="r", output="two", rules=rules, strict="true").code == 3


def test_inputs_are_words_not_code(tmp_path: Path, env: dict[str, str]) -> None:
    """What a pull request can write into an input never becomes a part of a script."""
    for step in action()["runs"]["steps"]:
        assert "${{" not in step["run"], step["name"]
        assert step["shell"] == "bash"
    hostile = '"; touch owned; echo "$(touch owned) `touch owned`'
    job = play(tmp_path, env, package="", recipe=hostile, model=hostile, rules=f"kl <= 0.1 # {hostile}")
    assert job.code == 0, job.log
    assert not (tmp_path / "owned").exists()
    assert (tmp_path / "calls.txt").read_text().splitlines()[0] == hostile


def test_install(tmp_path: Path, env: dict[str, str]) -> None:
    calls = tmp_path / "pip.txt"
    python = Path(env["PATH"].partition(":")[0]) / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {calls}\n')
    python.chmod(0o755)
    assert play(tmp_path, env, recipe="r").code == 0
    assert calls.read_text().split() == ["-m", "pip", "install", "--disable-pip-version-check", "compress-hf"]


def test_both_files_are_valid() -> None:
    program = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "check-jsonschema is one of the development tools: pip install -e '.[dev]'"
    for schema, path in (("vendor.github-actions", ACTION), ("vendor.github-workflows", EXAMPLE)):
        done = subprocess.run(
            [program, "--builtin-schema", schema, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_uses_what_the_action_has() -> None:
    example = yaml.safe_load(EXAMPLE.read_text())
    used = next(step for step in example["jobs"]["gate"]["steps"] if step.get("id") == "compress")
    assert set(used["with"]) <= set(action()["inputs"])
    assert len([parse_rule(rule.partition("#")[0]) for rule in used["with"]["rules"].splitlines()]) == 3
    named = re.findall(r"steps\.compress\.outputs\.(\w+)", EXAMPLE.read_text())
    assert set(named) <= set(action()["outputs"])


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that `compress run` leaves is what the gate step expects."""
    save_checkpoint(tiny_llama(1), tmp_path / "tiny")
    text = str(write_text(tmp_path / "t.txt", 1200))
    steps = [
        {"quantize": {"method": "rtn", "format": "int8"}},
        {"eval": {"text": text, "max_tokens": 1700, "context": 32}},
    ]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"steps": steps}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    for words in (
        ["run", "r.yaml", "--output", "out", "--model", "tiny", "--quiet"],
        ["gate", f"out/{BASELINE_EVALUATION}", f"out/{EVALUATION}", "--rule", "kl <= 5"],
    ):
        monkeypatch.setattr("sys.argv", ["compress", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code, capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "compress_gate.json").read_text())["passed"]
