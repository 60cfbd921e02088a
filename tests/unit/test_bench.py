"""Running a table: rows made once, failures recorded, kills survived, other tools' rows paired with ours."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import CheckpointError, RecipeError, VerificationError
from compressor.evals.bench import rows, steps
from compressor.evals.bench.__main__ import main
from compressor.evals.bench.peers.__main__ import main as peers
from compressor.evals.bench.peers.environments import SetupError
from compressor.evals.bench.record import read_record
from compressor.evals.bench.render import render_table
from compressor.evals.bench.runner import Settings, Summary, run_table
from compressor.evals.bench.stock import evaluation_from_scores
from compressor.evals.bench.table import TABLES, read_table
from compressor.evals.bench.vision_page import render_vision
from compressor.evals.bench.vision_table import is_vision, read_vision_table
from compressor.files import sha256_file
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, write_text

SEGMENTS = 5

FAKE_COMPRESS = """
import hashlib, json, os, pathlib, sys, time
words = sys.argv[1:]
flags = dict(zip(words, [*words[1:], ""]))
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(words) + chr(10))
output = pathlib.Path(flags["--output"])
output.mkdir(exist_ok=True)
if words[0] == "quantize":
    if flags["--method"] == "broken" and not os.environ.get("MENDED"):
        print("some progress")
        print(f"error: {os.getcwd()}/x: cannot do {flags['--data']}", "hint: do not", sep=chr(10), file=sys.stderr)
        sys.exit(4)
    if flags["--method"] == "slow":
        pathlib.Path(os.environ["CALLS"]).with_name("pid").write_text(str(os.getpid()))
        time.sleep(60)
    report = {"versions": {"compressor": "1"}, "bytes_after": 1234567, "bits_per_weight": 4.25}
    (output / "compress_report.json").write_text(json.dumps(report))
else:
    if "UNSCORABLE" in os.environ:
        sys.exit(7)
    original = "--baseline" not in words
    shift = 0.0 if original else 0.25
    n = 5
    nll = [10.0 * (k + 1) + shift * (k + 1) for k in range(n)]
    model = {"name": words[1], "commit": None, "fingerprint": "f" * 8, "execution_path": "p", "dtype": "float32"}
    samples = {"id": list(range(n)), "hash": [f"h{k}" for k in range(n)], "weight": [8, 8, 8, 8, 4]}
    settings = {"text": flags["--text"], "segment": 8, "text_sha256": os.environ["TOKENS"]}
    total = sum(nll) / 36
    import math
    tasks = {"perplexity": {"version": "1", "settings": settings, "metrics": {
        "perplexity": {"value": math.exp(total), "standard_error": 0.5},
        "nll": {"value": total, "standard_error": 0.1}},
        "samples": {**samples, "values": {"nll": nll}}}}
    if not original:
        tasks["kl"] = {"version": "1", "settings": settings, "metrics": {
            "kl": {"value": 0.125, "standard_error": 0.0625}, "kl_p99": {"value": 1.0, "standard_error": None},
            "agreement": {"value": 0.75, "standard_error": 0.01}},
            "samples": {**samples, "values": {"kl": [1.0] * n, "agreement": [6.0] * n}}}
    (output / "compress_eval.json").write_text(json.dumps({"schema": "compressor-eval/1", "model": model,
        "baseline": None if original else {**model, "name": flags["--baseline"]}, "versions": {"compressor": "1"},
        "seed": 0, "tasks": tasks, "timing": {"seconds": 1.0}}))
"""

FAKE_TOOL = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1:], [*sys.argv[2:], ""]))
tokens = pathlib.Path(flags["--tokens"])
assert pathlib.Path(flags["--model"], "config.json").is_file() and tokens.name == "calibration.npy"
pathlib.Path(flags["--output"]).mkdir()
report = {"versions": {"tool": "9"}, "weight_bytes": 1000, "bits_per_weight": 4.5, "seconds": 1}
pathlib.Path(flags["--report"]).write_text(json.dumps(report))
"""

FAKE_SCORE = """
import json, os, pathlib, sys
flags = dict(zip(sys.argv[1:], [*sys.argv[2:], ""]))
assert pathlib.Path(flags["--model"]).is_dir() and flags["--context"] == "64" and flags["--segment"] == "8"
off = float(os.environ.get("OFF", "0"))
scores = {"versions": {"transformers": "9"}, "fingerprint": "abc", "weight": [8, 8, 8, 8, 4],
    "text_sha256": os.environ["TOKENS"], "nll": [10.5 * (k + 1) for k in range(5)],
    "baseline_nll": [10.0 * (k + 1) + off for k in range(5)],
    "kl": [0.5] * 5, "agreement": [4.0, 4.0, 4.0, 4.0, 2.0], "kl_p99": 0.75}
pathlib.Path(flags["--report"]).write_text(json.dumps(scores))
"""


class Place:
    """A folder with a tiny model, a text, a table, and programs that stand for `compress` and for another tool."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.data = folder / "data"
        save_checkpoint(tiny_llama(), self.data / "tiny")
        self.text = write_text(self.data / "text.txt")
        (folder / "compress.py").write_text(FAKE_COMPRESS)
        external = folder / "external"
        external.mkdir()
        (external / "llmcompressor_row.py").write_text(FAKE_TOOL)
        (external / "stock_score.py").write_text(FAKE_SCORE)
        monkeypatch.setattr(rows, "COMPRESS", (sys.executable, "-I", "-S", str(folder / "compress.py")))
        monkeypatch.setattr(rows, "EXTERNAL", external)
        monkeypatch.setenv("TOKENS", "0" * 64)
        monkeypatch.setenv("CALLS", str(self.calls))

    def table(self, *entries: dict[str, Any], **changes: Any) -> Path:
        text = {"file": "text.txt", "sha256": sha256_file(self.text)}
        described = {
            "title": "A table",
            "model": "tiny",
            "calibration": {**text, "samples": 4, "seq_len": 32},
            "evaluation": {**text, "tokens": 300, "context": 64},
            "rows": list(entries),
            **changes,
        }
        path = self.folder / "mine.yaml"
        path.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
        return path

    @property
    def results(self) -> Path:
        return self.folder / "results" / "mine"

    def run(self, *entries: dict[str, Any], **settings: Any) -> Summary:
        given: dict[str, Any] = {"data": self.data, "work": self.folder / "work", "results": self.results, **settings}
        return run_table(self.table(*entries), Settings(**given))

    def made(self) -> list[str]:
        """Return verb and method of every call of `compress` since the last look."""
        lines = [line.split() for line in self.calls.read_text().splitlines()] if self.calls.is_file() else []
        self.calls.unlink(missing_ok=True)
        return [words[0] + (" " + words[words.index("--method") + 1] if "--method" in words else "") for words in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


RTN = {"method": "rtn", "format": "int4", "group_size": 64}
FP4 = {"method": "fp4", "format": "nvfp4", "options": {"sweeps": 2}}
BROKEN = {"method": "broken", "format": "int4"}
TOOL = {"tool": "llmcompressor", "algorithm": "gptq", "format": "int4", "group_size": 64}


def test_rows_are_made_once_and_only_what_changed_is_made_again(place: Place) -> None:
    assert place.run(RTN, FP4).done == ("original", "int4 g64 rtn", "nvfp4 fp4")
    assert place.made() == ["eval", "quantize rtn", "eval", "quantize fp4", "eval"]
    assert not [path for path in (place.folder / "work").iterdir() if path.is_dir()], "finished rows leave nothing"
    again = place.run(RTN, FP4)
    assert again.kept == ("original", "int4 g64 rtn", "nvfp4 fp4")
    assert again.complete
    assert place.made() == []
    changed = place.run(RTN, {**FP4, "options": {"sweeps": 3}})
    assert changed.done == ("nvfp4 fp4",)
    assert place.made() == ["quantize fp4", "eval"]
    assert place.run({**RTN, "name": "renamed"}, FP4).kept == ("original", "renamed", "nvfp4 fp4")
    assert place.made() == []
    assert place.run(RTN, FP4, rows="*fp4", rerun=True).done == ("nvfp4 fp4",)
    assert place.made() == ["quantize fp4", "eval"]


def test_rows_of_a_planted_table_start_from_the_copy(place: Place) -> None:
    path, work = place.table(RTN), place.folder / "work"
    path.write_text(path.read_text() + "planted: {channels: 2}\n", encoding="utf-8")
    settings = Settings(data=place.data, work=work, results=place.results)
    assert run_table(path, settings).done == ("original", "int4 g64 rtn")
    calls = place.calls.read_text().splitlines()
    assert len(calls) == 3
    assert all(str((work / "tiny-planted").resolve()) in call for call in calls)
    assert not any(str(place.data / "tiny") in call for call in calls)
    record = read_record(next(place.results.glob("int4*.json")))
    assert record is not None
    assert record.commands[0].startswith("compress quantize tiny-planted --method rtn ")
    assert "--baseline tiny-planted" in record.commands[1]
    assert "`tiny` with 2 channels behind every norm 32 times as loud" in render_table(path, place.results)
    place.made()
    assert place.run(RTN).done == ("original", "int4 g64 rtn"), "the model itself is another one"


def test_another_model_of_the_same_name_makes_every_row_again(place: Place) -> None:
    place.run(RTN)
    place.made()
    save_checkpoint(tiny_llama(seed=1), place.data / "tiny")
    assert place.run(RTN).done == ("original", "int4 g64 rtn")


def test_a_record_says_all_and_names_no_path(place: Place) -> None:
    place.run(RTN, FP4, TOOL, BROKEN, environments={"llmcompressor": sys.executable}, threads=2)
    files = sorted(place.results.iterdir())
    assert len(files) == 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        for private in (str(place.folder), str(Path.home()), sys.executable, os.uname().nodename):
            assert private not in text, path.name
    record = read_record(next(path for path in files if path.name.startswith("nvfp4-fp4")))
    assert record is not None
    assert record.evaluation is not None
    assert record.commands == (
        "compress quantize tiny --method fp4 --format nvfp4 --option sweeps=2 --data text.txt --n-samples 4 "
        "--seq-len 32 --seed 0 --device cpu --output checkpoint",
        "compress eval checkpoint --baseline tiny --text text.txt --max-tokens 300 --context 64 --device cpu "
        "--output .",
    )
    assert (record.weight_bytes, record.bits_per_weight) == (1234567, 4.25)
    assert record.evaluation.model.name == "nvfp4 fp4"
    assert record.machine["threads"] == 2
    assert record.machine["cores"] == os.cpu_count()
    assert record.cost["quantize"].seconds > 0
    assert 1 << 20 < record.cost["quantize"].peak_rss < 60 << 20, "the small program's own, not the test's"
    original = read_record(next(path for path in files if path.name.startswith("original")))
    assert original is not None
    assert original.bits_per_weight == 32
    assert original.weight_bytes == (place.data / "tiny" / "model.safetensors").stat().st_size - header_bytes(place)


def header_bytes(place: Place) -> int:
    with (place.data / "tiny" / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_failed_row_is_recorded_and_the_others_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = place.run(BROKEN, RTN)
    assert summary.done == ("original", "int4 g64 rtn")
    assert summary.failed == {"int4 broken": "WORK/int4-broken-" + key(place, 1)[-12:] + "/x: cannot do text.txt"}
    page = render_table(place.folder / "mine.yaml", place.results)
    assert "| int4 broken | - | - | - | - | - | - | - | - | failed |" in page
    assert "- int4 broken: WORK/" in page
    place.made()
    monkeypatch.setenv("MENDED", "1")
    assert place.run(BROKEN, RTN).done == ("int4 broken",)
    assert place.made() == ["quantize broken", "eval"]
    assert "failed" not in render_table(place.folder / "mine.yaml", place.results)


def key(place: Place, index: int) -> str:
    table = read_table(place.folder / "mine.yaml")
    return table.key(table.rows[index])


def test_a_step_that_was_finished_is_not_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.run(RTN, rows="original")
    monkeypatch.setenv("UNSCORABLE", "1")
    assert place.run(RTN).failed == {"int4 g64 rtn": "exit code 7 and no output"}
    place.made()
    monkeypatch.delenv("UNSCORABLE")
    assert place.run(RTN).done == ("int4 g64 rtn",)
    assert place.made() == ["eval"]


def test_a_result_of_another_table_is_taken_over(place: Place) -> None:
    place.run(RTN)
    place.made()
    other = place.folder / "results" / "other"
    summary = place.run({**RTN, "name": "same row"}, results=other)
    assert summary.kept == ("original", "same row")
    assert place.made() == []
    record = read_record(next(other.glob("same-row-*.json")))
    assert record is not None
    assert record.name == "same row"


def test_a_killed_run_keeps_finished_rows_and_ends_its_command(place: Place) -> None:
    table = place.table(RTN, {"method": "slow", "format": "int4"}, FP4)
    arguments = ["run", str(table), "--data-dir", str(place.data), "--work", str(place.folder / "work")]
    code = (
        "import sys; from compressor.evals.bench import rows; from compressor.evals.bench.__main__ import main\n"
        f"rows.COMPRESS = {rows.COMPRESS!r}\nsys.exit(main({arguments!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid_file = place.folder / "pid"
    deadline = time.monotonic() + 60
    while not (pid_file.is_file() and pid_file.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    running = int(pid_file.read_text())
    with pytest.raises(RecipeError, match="another run is using it"):
        place.run(RTN)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 143, err
    assert err == "terminated; finished rows are kept\n"
    assert "int4 g64 rtn: done" in out
    assert not alive(running)
    assert sorted(path.suffix for path in place.results.iterdir()) == [".json", ".json"]
    assert all(read_record(path) for path in place.results.iterdir())
    place.made()
    assert place.run(RTN, FP4).kept == ("original", "int4 g64 rtn")


def alive(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def test_rows_of_a_tool_without_environment_are_skipped(place: Place) -> None:
    summary = place.run(RTN, TOOL)
    assert summary.skipped == {"int4 g64 llmcompressor gptq": "needs --env llmcompressor=PYTHON"}
    assert not summary.complete
    assert "| int4 g64 llmcompressor gptq | - |" in render_table(place.folder / "mine.yaml", place.results)
    assert "not run yet" in render_table(place.folder / "mine.yaml", place.results)


def test_rows_of_a_tool_are_scored_by_stock_transformers(place: Place) -> None:
    assert place.run(TOOL, environments={"llmcompressor": sys.executable}).complete
    record = read_record(next(place.results.glob("int4-g64-llmcompressor-gptq-*.json")))
    assert record is not None
    assert record.evaluation is not None
    assert record.commands == ("python llmcompressor_row.py --algorithm gptq --format int4 --group-size 64 --seed 0",)
    assert (record.versions, record.weight_bytes, record.bits_per_weight) == ({"tool": "9"}, 1000, 4.5)
    tasks = record.evaluation.tasks
    assert tasks["perplexity"].metrics["nll"].value == pytest.approx(10.5 * 15 / 36)
    assert tasks["perplexity"].metrics["perplexity"].value == pytest.approx(math.exp(10.5 * 15 / 36))
    assert tasks["kl"].metrics["kl"].value == pytest.approx(2.5 / 36)
    assert tasks["kl"].metrics["agreement"].value == pytest.approx(0.5)
    page = render_table(place.folder / "mine.yaml", place.results)
    row = next(line for line in page.splitlines() if line.startswith("| int4 g64 llmcompressor"))
    assert "| 4.5 | 0.0 MB |" in row
    assert f"| {7.5 / 36:.4f} ± " in row, "the paired difference of 0.5 (k + 1) per segment"


def test_rows_of_both_sides_are_read_by_stock_transformers(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = place.table(RTN, TOOL, reader="stock")
    common = ["--data-dir", str(place.data), "--work", str(place.folder / "work"), "--results", str(place.results)]
    tool = ["--env", f"llmcompressor={sys.executable}"]
    assert peers(["run", "--table", str(table), *common, *tool, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("3 rows made, 0 kept, 0 failed, 0 skipped\n")
    assert [line.split()[0] for line in place.calls.read_text().splitlines()] == ["eval", "quantize"]
    ours = read_record(next(place.results.glob("int4-g64-rtn-*.json")))
    assert ours is not None
    assert ours.evaluation is not None
    assert ours.evaluation.tasks["kl"].metrics["kl"].value == pytest.approx(2.5 / 36)
    assert ours.commands[-1] == "python stock_score.py --model checkpoint --baseline tiny --context 64"
    assert ours.versions == {"compressor": "1"}
    data = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert [row["tool"] for row in data["rows"]] == [None, "compressor", "llmcompressor"]
    assert data["jobs"][0]["ahead"] == "level"
    assert "## Who is ahead" in (tmp_path / "out" / "peers.md").read_text()


def test_a_tool_without_environment_is_skipped_and_named(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, *_: object) -> Path:
        raise SetupError(f"{name}: no environment: ERROR: no such version")

    monkeypatch.setattr("compressor.evals.bench.peers.__main__.make_environment", fail)
    table = place.table(TOOL, reader="stock")
    common = ["--data-dir", str(place.data), "--work", str(place.folder / "work"), "--results", str(place.results)]
    assert peers(["run", "--table", str(table), *common, "--envs", str(tmp_path), "--output", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "llmcompressor: no environment: ERROR: no such version" in said
    assert "needs --env llmcompressor=PYTHON" in said
    assert json.loads((tmp_path / "peers.json").read_text())["missing_tools"] == {
        "llmcompressor": "llmcompressor: no environment: ERROR: no such version"
    }


def test_a_row_may_calibrate_on_other_text(place: Place) -> None:
    other = write_text(place.data / "other.txt")
    text = {"file": "other.txt", "sha256": sha256_file(other)}
    half = {**RTN, "label": "rtn half", "text": {**text, "part": [0.5, 1.0]}, "samples": 2, "seq_len": 16}
    own = {**RTN, "label": "rtn self", "text": {"preset": "self"}}
    assert place.run({**RTN, "label": "rtn other", "text": text}, half, own).complete
    calls = [line.split() for line in place.calls.read_text().splitlines()]
    made = {
        flags["--n-samples"] + flags["--data"]: flags
        for call in calls
        if (flags := dict(itertools.pairwise(call))) and call[0] == "quantize"
    }
    assert f"4{other.resolve()}" in made
    assert made["4self"]["--seq-len"] == "32"
    part = next(flags for flags in made.values() if flags["--n-samples"] == "2")
    whole = other.read_text(encoding="utf-8")
    assert Path(part["--data"]).read_text(encoding="utf-8") == whole[round(len(whole) / 2) :]
    assert part["--seq-len"] == "16"
    record = read_record(next(place.results.glob("int4-g64-rtn-half-*.json")))
    assert record is not None
    assert "--data other.txt" in record.commands[0]


def test_a_tool_row_fails_if_the_original_scores_differ(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFF", "0.2")
    summary = place.run(TOOL, environments={"llmcompressor": sys.executable})
    assert "stock transformers gives the original a perplexity of" in summary.failed["int4 g64 llmcompressor gptq"]


def test_what_cannot_be_run_is_refused_before_anything_runs(place: Place) -> None:
    with pytest.raises(RecipeError, match="no row matches 'x\\*'"):
        place.run(RTN, rows="x*")
    with pytest.raises(RecipeError, match="--env magic: no such tool"):
        place.run(RTN, environments={"magic": sys.executable})
    with pytest.raises(RecipeError, match="no such file"):
        place.run(RTN, environments={"autoround": str(place.folder / "none")})
    table = place.table(RTN)
    place.text.write_text("other words")
    settings = Settings(data=place.data, work=place.folder / "work", results=place.results)
    with pytest.raises(CheckpointError, match="SHA-256 is"):
        run_table(table, settings)
    place.text.unlink()
    with pytest.raises(RecipeError, match=r"text\.txt: no such file"):
        run_table(table, settings)
    assert place.made() == []


def test_command_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    table = place.table(RTN, BROKEN)
    common = [str(table), "--data-dir", str(place.data), "--work", str(place.folder / "work")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["run", *common, "--rows", "*rtn"]) == 0
        assert main(["run", *common]) == 3
        assert "1 rows made" not in capsys.readouterr().err
        assert main(["run", *common, "--env", "llmcompressor"]) == 2
        assert capsys.readouterr().err.startswith("error: --env 'llmcompressor' is not TOOL=PYTHON\nhint: ")
        page = (place.folder / "mine.md").read_text(encoding="utf-8")
        assert "| int4 g64 rtn | 4.25 | 1.2 MB |" in page
        assert main(["render", str(table)]) == 0
        assert (place.folder / "mine.md").read_text(encoding="utf-8") == page
        assert main(["render", str(place.folder / "none.yaml")]) == 2
        assert main(["list"]) == 0
        assert "weight-only: " in capsys.readouterr().out
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_page_comes_from_the_row_files_alone(place: Place) -> None:
    place.run(RTN, FP4, {**RTN, "label": "again", "options": {"clip": "mse"}})
    page = render_table(place.folder / "mine.yaml", place.results)
    assert page == render_table(place.folder / "mine.yaml", place.results)
    cells = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")]
    assert cells == ["row", "---", "original", "int4 g64 rtn", "int4 g64 again", "nvfp4 fp4"], "one grid side by side"
    row = next(line for line in page.splitlines() if line.startswith("| int4 g64 rtn"))
    total = sum(0.25 * (k + 1) for k in range(SEGMENTS)) / 36
    assert f"| {total:.4f} ± " in row
    assert "| 0.1250 ± 0.0625 | 75.0 % ± 1.0 |" in row
    damaged = next(place.results.glob("int4-g64-rtn-*.json"))
    damaged.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        render_table(place.folder / "mine.yaml", place.results)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_pages_are_up_to_date(path: Path) -> None:
    page = path.with_suffix(".md")
    made = render_vision(path) if is_vision(path) else render_table(path)
    assert page.read_text(encoding="utf-8") == made, (
        f"write it again: python -m compressor.evals.bench render {path.stem}"
    )


def test_every_committed_result_belongs_to_a_row_and_names_no_path() -> None:
    for path in sorted(TABLES.glob("*.yaml")):
        if is_vision(path):
            seeds = read_vision_table(path)
            keys = {seeds.key(seed) for seed in range(seeds.seeds)}
        else:
            table = read_table(path)
            keys = {table.key(row) for row in table.rows}
        for file in (TABLES.parent / "results" / path.stem).glob("*.json"):
            assert file.stem in keys, f"{file} is a result of no row of {path.name}"
            text = file.read_text(encoding="utf-8")
            assert not [private for private in ("/tmp/", "/home/", "/root/") if private in text], file


def test_scores_of_other_segments_are_refused(place: Place) -> None:
    place.run(RTN, rows="original")
    record = read_record(next(place.results.glob("original-*.json")))
    assert record is not None
    assert record.evaluation is not None
    scores = {"weight": [8, 8, 8, 12], "baseline_nll": [1.0] * 4, "text_sha256": "0" * 64}
    with pytest.raises(VerificationError, match="scored 4 segments of 36 predictions"):
        evaluation_from_scores(scores, record.evaluation, "row", 1.0)
    with pytest.raises(VerificationError, match="of other tokens"):
        evaluation_from_scores({**scores, "text_sha256": "1" * 64}, record.evaluation, "row", 1.0)


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        ("working\nTraceback\nValueError: no\n", 1, "ValueError: no"),
        ("\x1b[31merror: \x1b[0mtoo long\nhint: shorter\n", 2, "too long"),
        ("progress 1\rprogress 2\r", 137, "killed by signal 9"),
        ("", 3, "exit code 3 and no output"),
        ("y" * 1000, 1, "y" * 299 + "…"),
    ],
)
def test_the_line_that_says_what_went_wrong(tmp_path: Path, log: str, code: int, error: str) -> None:
    path = tmp_path / "log"
    path.write_text(log, encoding="utf-8")
    assert steps.last_error(path, code) == error


def test_damaged_step_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "quantize.json").write_text(json.dumps({"request": {}}))
    with pytest.raises(CheckpointError, match=r"quantize\.json: damaged"):
        steps.finished(tmp_path, "quantize", {})
    cost = steps.Cost(1.0, 2.0, 3)
    (tmp_path / "quantize.json").write_text(json.dumps({"request": {"a": 1}, "cost": cost.to_json()}))
    assert steps.finished(tmp_path, "quantize", {"a": 1}) == cost
    assert steps.finished(tmp_path, "quantize", {"a": 2}) is None
    assert replace(cost, peak_rss=4) != cost
