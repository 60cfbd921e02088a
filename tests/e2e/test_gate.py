"""`compress gate` as a pipeline calls it: exit codes, files, one-line errors, and a quick start."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from compressor.cli import app as cli
from compressor.evals.scores import TaskResult
from compressor.testing.evaluations import document_task, evaluation, kl_task, perplexity_task
from compressor.testing.tools import run_cli

PASS, FAIL, UNSURE = "ppl <= +2%", "kl <= 0.03", "qa >= -1pt"


def tasks(compressed: bool) -> dict[str, TaskResult]:
    rng = np.random.default_rng(1)
    nll, noise, kl = rng.normal(3.2, 0.4, 64), rng.normal(0.01, 0.01, 64), rng.gamma(6, 0.04 / 6, 64)
    acc = np.tile([1.0, 0.0], 100)
    if not compressed:
        return {"perplexity": perplexity_task(nll), "qa": document_task(acc=acc)}
    acc[0] = 0
    return {"perplexity": perplexity_task(nll + noise), "qa": document_task(acc=acc), "kl": kl_task(kl)}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    base, new = tmp_path / "base.json", tmp_path / "new.json"
    base.write_text(json.dumps(evaluation("original", tasks(False)).to_json()))
    new.write_text(json.dumps(evaluation("compressed", tasks(True), "original").to_json()))
    return base, new


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Run the command line in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["compress", "gate", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    done = capsys.readouterr()
    return int(caught.value.code or 0), done.out, done.err


def test_a_pipeline(files: tuple[Path, Path], tmp_path: Path) -> None:
    """What a job sees of a real process: files, the summary of the step, and exit code 3."""
    summary, junit, page = tmp_path / "summary.md", tmp_path / "reports" / "gate.xml", tmp_path / "gate.md"
    summary.write_text("earlier step\n")
    done = run_cli(
        "gate", *files, "--rule", PASS, "--rule", FAIL, "--rule", UNSURE, "--junit", junit, "--markdown", page,
        env={"GITHUB_STEP_SUMMARY": str(summary), "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "gate failed: 1 pass, 1 fail, 1 inconclusive" in done.stdout
    row = next(line for line in done.stdout.splitlines() if PASS in line)
    assert "pass" in row
    assert "64 segments" in row
    assert summary.read_text() == "earlier step\n" + page.read_text()
    assert page.read_text().startswith("### gate failed")
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("skipped")) == ("1", "1")
    assert sorted(path.name for path in junit.parent.iterdir()) == ["gate.xml"]


@pytest.mark.parametrize(
    ("rules", "options", "code"),
    [
        ([PASS], [], 0),
        ([PASS], ["--strict"], 0),
        ([PASS, UNSURE], [], 0),
        ([PASS, UNSURE], ["--strict"], 3),
        ([UNSURE], ["--confidence", "0.51"], 0),
        ([PASS, FAIL], [], 3),
        ([FAIL], ["--json"], 3),
    ],
)
def test_exit_codes(
    rules: list[str],
    options: list[str],
    code: int,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [part for rule in rules for part in ("--rule", rule)]
    got, out, err = call(capsys, monkeypatch, *files, *given, *options)
    assert (got, err) == (code, "")
    if "--json" in options:
        assert json.loads(out)["passed"] is False


def test_rules_from_a_file_come_after_those_on_the_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text(f"# release\n{FAIL}\n{UNSURE}\n")
    code, out, _ = call(capsys, monkeypatch, *files, "--rules", rules, "--rule", PASS, "--json")
    assert code == 3
    assert [rule["rule"] for rule in json.loads(out)["rules"]] == [PASS, FAIL, UNSURE]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "there are no rules to judge by"),
        (["--rule", "ppl < +2%"], 2, "rule 'ppl < +2%': '<' is not >= or <="),
        (["--rule", "mmlu >= -1pt"], 2, "the new evaluation has no task 'mmlu'"),
        (["--rule", "kl <= +0.01"], 2, "the baseline's evaluation has no kl.kl"),
        (["--rule", PASS, "--confidence", "95"], 2, "a confidence of 95 is not between"),
        (["--rule", PASS, "--rules", "nowhere.txt"], 4, "nowhere.txt: cannot be read: No such file"),
        (["--rule", PASS, "--junit", "."], 5, ".: cannot write: Is a directory"),
        (["--rule", PASS, "--markdown", "/dev/null/gate.md"], 5, "/dev/null/gate.md: cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    words: str,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files[0].parent)
    got, _, err = call(capsys, monkeypatch, *files, *arguments)
    assert got == code, err
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")


def test_other_documents_and_unreadable_files(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = files
    data = json.loads(base.read_text())
    data["tasks"]["qa"]["samples"]["hash"][5] = "other"
    base.write_text(json.dumps(data))
    code, out, err = call(capsys, monkeypatch, base, new, "--rule", UNSURE)
    assert (code, out) == (2, "")
    assert "not the same documents: another hash for 1 of 200, for example 5" in err
    data["tasks"]["qa"]["samples"]["values"]["acc"][5] = float("nan")
    base.write_text(json.dumps(data))
    code, _, err = call(capsys, monkeypatch, base, new, "--rule", UNSURE)
    assert (code, "is nan, not finite" in err) == (4, True)
    code, _, err = call(capsys, monkeypatch, tmp_path / "no.json", new, "--rule", UNSURE)
    assert (code, "no.json: cannot be read: No such file" in err) == (4, True)


def test_a_step_summary_that_cannot_be_written(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files[0].parent))
    code, _, err = call(capsys, monkeypatch, *files, "--rule", PASS)
    assert (code, "cannot write: Is a directory" in err) == (5, True)


def test_no_model_library_is_imported(files: tuple[Path, Path]) -> None:
    code = (
        "import sys; from compressor.cli.app import app;"
        f"app(['gate', {str(files[0])!r}, {str(files[1])!r}, '--rule', {PASS!r}], standalone_mode=False);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
