"""Killed runs continue and write the same bytes; half-written folders never load."""

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import compressor
from compressor.errors import CompressorError, RecipeError
from compressor.report import RunReport, Silent
from compressor.testing import models
from compressor.testing.tools import cli_command, run_cli, save_checkpoint, tree_hash, write_text

UNITS = 7  # six blocks and what lies outside them


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("resume")
    source = save_checkpoint(models.tiny_llama(layers=UNITS - 1), root / "source")
    text = write_text(root / "text.txt")
    arguments = ["quantize", str(source), "--data", str(text), "--n-samples", "6", "--seq-len", "32"]
    done = run_cli(*arguments, "-o", root / "whole")
    assert done.returncode == 0, done.stderr
    return root, arguments


class Events(Silent):
    """Collects what a user would be told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, text: str) -> None:
        self.texts.append(text)


def rerun(root: Path, out: Path) -> tuple[RunReport, list[str]]:
    """Give the same command again, in this process: starting one costs seconds, and one test does that too."""
    events = Events()
    report = compressor.quantize(
        str(root / "source"), output=out, data=str(root / "text.txt"), n_samples=6, seq_len=32, progress=events
    )
    return report, events.texts


def kill_when(process: "subprocess.Popen[str]", journal: Path, lines: int, how: signal.Signals) -> int:
    """Send a signal once the journal has so many lines; returns how many it had when the process was gone."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(how)
            break
        time.sleep(0.002)
    process.wait(timeout=60)
    return journal.read_bytes().count(b"\n") if journal.exists() else -1


def loads(folder: Path) -> bool:
    for load in (compressor.load, AutoModelForCausalLM.from_pretrained):
        try:
            load(folder)
        except (CompressorError, OSError, ValueError):
            continue
        return True
    return False


@pytest.mark.parametrize("lines", [0, 1, 3, 6])
def test_sigkill_and_rerun_write_the_same_bytes(setup: tuple[Path, list[str]], lines: int) -> None:
    root, arguments = setup
    out = root / f"killed-{lines}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(cli_command(*arguments, "-o", out), stderr=subprocess.DEVNULL, env=env, text=True)
    journal = out / ".compress-work" / "journal.jsonl"
    if lines == 0:
        while not (out / ".compress-work" / "hidden").exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait(timeout=60)
        written = 0
    else:
        written = kill_when(process, journal, lines, signal.SIGKILL)
    if process.returncode == 0:
        pytest.fail("the run was over before it could be killed: make the model larger")
    assert not loads(out)
    if lines == 3:  # once as a user would
        again = run_cli(*arguments, "-o", out, "--json")
        assert again.returncode == 0, again.stderr
        assert "continuing:" in again.stderr
        resumed_at = json.loads(again.stdout)["resumed_at"]
    else:
        resumed_at = rerun(root, out)[0].resumed_at
    assert resumed_at >= min(written, lines)
    assert tree_hash(out) == tree_hash(root / "whole")
    assert loads(out)


def test_sigterm_keeps_what_is_done(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = root / "terminated"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(cli_command(*arguments, "-o", out), stderr=subprocess.DEVNULL, env=env, text=True)
    assert kill_when(process, out / ".compress-work" / "journal.jsonl", 2, signal.SIGTERM) >= 2
    assert process.returncode == 143
    assert rerun(root, out)[0].resumed_at >= 2
    assert tree_hash(out) == tree_hash(root / "whole")


def interrupted(root: Path, arguments: list[str], name: str) -> Path:
    """Leave an unfinished run behind, stopped by a full disk in the third unit's place."""
    out = root / name
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(cli_command(*arguments, "-o", out), stderr=subprocess.DEVNULL, env=env, text=True)
    kill_when(process, out / ".compress-work" / "journal.jsonl", 2, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return out


def test_damaged_shard_is_noticed_and_redone(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = interrupted(root, arguments, "damaged")
    part = out / ".compress-work" / "model.safetensors.part"
    data = bytearray(part.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    entries = json.loads(bytes(data[8:header]))
    start = entries["model.layers.0.mlp.up_proj.weight_packed"]["data_offsets"][0]
    data[header + start] ^= 1
    part.write_bytes(data)
    _, events = rerun(root, out)
    assert any("model.layers.0: what is on disk is not what was written" in event for event in events)
    assert tree_hash(out) == tree_hash(root / "whole")


def test_damaged_hidden_states_are_noticed(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = interrupted(root, arguments, "hidden")
    last = json.loads((out / ".compress-work" / "journal.jsonl").read_bytes().splitlines()[-1])
    state = out / ".compress-work" / "hidden" / last["streams"]["fp"]["file"]
    state.write_bytes(state.read_bytes()[:-4])
    _, events = rerun(root, out)
    assert any("saved hidden states are damaged" in event for event in events)
    assert tree_hash(out) == tree_hash(root / "whole")


def test_torn_journal_line_counts_as_never_written(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = interrupted(root, arguments, "torn")
    with (out / ".compress-work" / "journal.jsonl").open("ab") as file:
        file.write(b'{"name": "model.la')
    rerun(root, out)
    assert tree_hash(out) == tree_hash(root / "whole")


def test_another_recipe_does_not_continue(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = interrupted(root, arguments, "other")
    other = run_cli(*arguments, "-o", out, "--seed", "1")
    assert other.returncode == 2
    assert "different: calibration, recipe.seed" in other.stderr
    assert (out / ".compress-work" / "journal.jsonl").exists()
    forced = run_cli(*arguments, "-o", out, "--seed", "1", "--force", "--json")
    assert forced.returncode == 0, forced.stderr
    assert json.loads(forced.stdout)["resumed_at"] == 0


def test_second_process_is_refused(setup: tuple[Path, list[str]]) -> None:
    from filelock import FileLock

    root, arguments = setup
    out = interrupted(root, arguments, "locked")
    with FileLock(out / ".compress-work" / "lock"):
        second = run_cli(*arguments, "-o", out)
    assert second.returncode == 2
    assert "another process is writing it" in second.stderr


def test_disk_full(setup: tuple[Path, list[str]]) -> None:
    root, arguments = setup
    out = root / "full"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        cli_command(*arguments, "-o", out), capture_output=True, text=True, env=env, preexec_fn=small_files, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not loads(out)
    rerun(root, out)
    assert tree_hash(out) == tree_hash(root / "whole")


def test_failed_verification_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.verify import VerificationResult

    def disagree(folder: Path, probe: Path, **_: object) -> VerificationResult:
        return VerificationResult(False, 1.0, 0.5, 1e-4, (), (), None, 0.0)

    source = save_checkpoint(models.tiny_llama(), tmp_path / "source")
    monkeypatch.setattr("compressor.verify.verify", disagree)
    with pytest.raises(CompressorError, match="reloaded logits differ") as caught:
        compressor.quantize(str(source), method="rtn", format="int4", output=tmp_path / "out")
    assert caught.value.exit_code == 7
    assert not loads(tmp_path / "out")
    monkeypatch.undo()
    compressor.quantize(str(source), method="rtn", format="int4", output=tmp_path / "out")  # and the rerun repairs it
    assert loads(tmp_path / "out")


def test_file_in_the_way(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_llama(), tmp_path / "source")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RecipeError, match="is a file"):
        compressor.quantize(str(source), method="rtn", output=tmp_path / "out")
