"""Whatever stops a run, the same command finishes it with the same bytes, and nothing half-written loads."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import compressor
import compressor.verify
from compressor import output
from compressor.checkpoint.sink import WORK, Journal
from compressor.errors import CompressorError
from compressor.testing import models
from compressor.testing.child import Child, Ended, call_main
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

JOURNAL = Path(WORK, "journal.jsonl")
UNITS = 3  # two blocks and what lies outside them
DEADLINE = 200.0  # far more than a run takes, on a machine that is busy with other things too
MUTATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
SAME = "ended with the bytes of a run that was left alone"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the result of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("crashes")
    save_checkpoint(models.tiny_llama(), root / "source")
    write_text(root / "text.txt", words=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        run(root, root / "whole")
    return root


def run(root: Path, out: Path) -> int:
    """GPTQ: hidden states are saved between blocks, and a block's codes depend on those before it."""
    options = {"method": "gptq", "format": "int4", "group_size": 32, "n_samples": 4, "seq_len": 16}
    compressor.quantize(str(root / "source"), output=out, data=str(root / "text.txt"), **options)
    return 0


def start(root: Path, out: Path, before: Callable[[], object] = lambda: None) -> Child:
    def work() -> int:
        before()
        return run(root, out)

    return Child(work)


def finish(root: Path, out: Path) -> None:
    """Give the command again, and compare."""
    ended = start(root, out).wait(DEADLINE)
    # A process killed while it cleared away after itself has written everything: the next one says so.
    assert ended.code == 0 or "holds a finished checkpoint" in ended.err, ended.err
    assert tree_hash(out) == tree_hash(root / "whole")


def lines(out: Path) -> int:
    return (out / JOURNAL).read_bytes().count(b"\n") if (out / JOURNAL).is_file() else 0


def check_unloadable(root: Path, out: Path) -> None:
    """What has a config.json is complete: whoever loads it gets the result."""
    if (out / "config.json").exists():
        whole = tree_hash(root / "whole")
        assert {name: digest for name, digest in tree_hash(out).items() if name in whole} == whole


def after_unit(n: int, act: Callable[[], object]) -> Callable[[], None]:
    """Return a function that makes this process act once so many units are in the journal."""

    def install() -> None:
        append, count = Journal.append, 0

        def appended(self: Journal, entry: dict[str, object]) -> None:
            nonlocal count
            append(self, entry)
            count += 1
            if count == n:
                act()

        Journal.append = appended  # type: ignore[method-assign]

    return install


def stopped(root: Path, out: Path, units: int = 1) -> Path:
    """Leave a run behind that ended after so many units."""
    assert start(root, out, after_unit(units, lambda: os._exit(9))).wait(DEADLINE).code == 9
    assert lines(out) == units
    return out


@pytest.mark.reliability("Crashes", "SIGKILL at a random moment")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random(root: Path, tmp_path: Path, tally: Counter[str], kills: int) -> None:
    rng = random.Random(kills)
    clock = start(root, tmp_path / "clock").wait(DEADLINE).seconds
    done = round_ = 0
    while done < kills:
        out = tmp_path / f"out-{round_}"
        round_ += 1
        for _ in range(rng.randint(1, 3)):  # a run that was killed may be killed again
            child = start(root, out)
            child.running(rng.uniform(0.0, clock))
            child.send(signal.SIGKILL)
            if child.wait(DEADLINE).code != -signal.SIGKILL:
                break  # it was faster
            done += 1
            tally[SAME] += 1
            check_unloadable(root, out)
        finish(root, out)
        shutil.rmtree(out)


@pytest.mark.reliability("Crashes", "SIGKILL right before a file is opened, renamed or removed")
@pytest.mark.parametrize("share", [0.05, pytest.param(0.35, marks=pytest.mark.slow)])
def test_killed_at_a_file_operation(root: Path, tmp_path: Path, tally: Counter[str], share: float) -> None:
    def at(moment: int, out: Path, log: Path | None = None) -> Callable[[], None]:
        """Kill this process at its so manieth operation on the output folder."""
        count, inside = 0, os.fsencode(out)

        def watch(event: str, details: tuple[object, ...]) -> None:
            nonlocal count
            if event not in MUTATIONS or not isinstance(details[0], str | bytes | Path):
                return
            if inside not in os.fsencode(details[0]) or (event == "open" and not int(details[2] or 0) & os.O_ACCMODE):
                return
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if log is not None:
                log.write_text(str(count))

        return lambda: sys.addaudithook(watch)

    log = tmp_path / "log"
    assert start(root, tmp_path / "clean", at(0, tmp_path / "clean", log)).wait(DEADLINE).code == 0
    total = int(log.read_text())
    assert total > 20
    moments = sorted(random.Random(0).sample(range(1, total + 1), max(1, round(share * total))))
    for moment in moments:
        out = tmp_path / f"at-{moment}"
        assert start(root, out, at(moment, out)).wait(DEADLINE).code == -signal.SIGKILL, moment
        check_unloadable(root, out)
        finish(root, out)
        shutil.rmtree(out)
        tally[SAME] += 1


@pytest.mark.reliability("Crashes", "SIGTERM and Ctrl-C between and inside units")
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        (signal.SIGTERM, 143, "terminated; the same command continues"),
        (signal.SIGINT, 130, "stopped; the same command"),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_interrupted(
    root: Path, tmp_path: Path, tally: Counter[str], how: signal.Signals, code: int, words: str
) -> None:
    ready, out = tmp_path / "ready", tmp_path / "out"

    def work() -> int:
        def pause() -> None:
            ready.write_text("now")
            end = time.monotonic() + DEADLINE
            while time.monotonic() < end:
                sum(range(1000))  # busy, as a method is

        after_unit(2, pause)()
        model, text = root / "source", root / "text.txt"
        flags = ("--method", "gptq", "-f", "int4", "--group-size", 32, "--n-samples", 4, "--seq-len", 16)
        return call_main("quantize", model, "-o", out, "--data", text, *flags)

    child = Child(work)
    while not ready.exists() and child.running(0.01):
        pass
    child.send(how)
    ended = child.wait(30)
    assert (ended.code, ended.late) == (code, False), ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert lines(out) == 2
    assert not (out / "config.json").exists()
    finish(root, out)
    tally[f"exit code {code}, state kept; then {SAME}"] += 1


def check_full(ended: Ended, out: Path) -> None:
    assert "the disk is full" in ended.err, ended.err
    assert not (out / "config.json").exists()


def refused_as_full(root: Path, out: Path, before: Callable[[], object] = lambda: None) -> Ended:
    """Run into a full disk; the child's exit code is the error's."""

    def work() -> int:
        before()
        try:
            return run(root, out)
        except CompressorError as error:
            sys.stderr.write(error.message)
            return error.exit_code

    return Child(work).wait(DEADLINE)


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """A file system of a given size; needs the right to mount one."""
    mounted: list[str] = []

    def mount(nbytes: int) -> Path:
        folder = tempfile.mkdtemp(prefix="compress-disk-")
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            os.rmdir(folder)
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return Path(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
        os.rmdir(folder)


@pytest.mark.reliability("Crashes", "file system too small for the result")
def test_disk_too_small(root: Path, tally: Counter[str], small_disk: Callable[[int], Path]) -> None:
    size = sum(path.stat().st_size for path in (root / "whole").iterdir())
    disk = small_disk(size // 2)
    ended = refused_as_full(root, disk / "out")
    assert ended.code == 5, ended.err
    check_full(ended, disk / "out")
    assert lines(disk / "out") == 0  # noticed before any work
    subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
    finish(root, disk / "out")
    tally[f"exit code 5 before any work; with room, {SAME}"] += 1


@pytest.mark.reliability("Crashes", "file system filled by others between two units")
@pytest.mark.parametrize("unit", [1, 2])
def test_disk_filled_in_the_middle(
    root: Path, tally: Counter[str], small_disk: Callable[[int], Path], unit: int
) -> None:
    size = sum(path.stat().st_size for path in (root / "whole").iterdir())
    disk = small_disk(8 * size)

    def fill() -> None:
        with (disk / "junk").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    ended = refused_as_full(root, disk / "out", after_unit(unit, fill))
    assert ended.code == 5, ended.err
    check_full(ended, disk / "out")
    assert lines(disk / "out") >= unit
    (disk / "junk").unlink()
    finish(root, disk / "out")
    tally[f"exit code 5, state kept; with room, {SAME}"] += 1


@pytest.mark.reliability("Crashes", "a write fails in the middle of a shard")
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_write_fails_inside_a_shard(root: Path, tmp_path: Path, tally: Counter[str], share: float) -> None:
    import resource

    size = (root / "whole" / "model.safetensors").stat().st_size
    out = tmp_path / "out"

    def limit() -> None:
        """From the first unit on no file may be written beyond a part of the shard: the kernel says so in write()."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    ended = refused_as_full(root, out, after_unit(1, limit))
    assert ended.code == 5, ended.err
    check_full(ended, out)
    finish(root, out)
    tally[f"exit code 5, state kept; with room, {SAME}"] += 1


@pytest.mark.reliability("Crashes", "output folder on a file system that is mounted read-only")
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_read_only_output(root: Path, tally: Counter[str], there: bool, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1 << 20)
    if there:
        (disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = refused_as_full(root, disk / "out")
    assert ended.code == 5, ended.err
    assert "cannot write: Read-only file system" in ended.err
    tally["exit code 5, one line that names the folder"] += 1


@pytest.mark.reliability("Crashes", "a byte changed between two runs, in any file of the unfinished result")
@pytest.mark.parametrize("changes", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_changed_between_runs(root: Path, tmp_path: Path, tally: Counter[str], changes: int) -> None:
    state = stopped(root, tmp_path / "state", units=2)
    files = sorted(path for path in state.rglob("*") if path.is_file() and path.stat().st_size)
    assert {"journal.jsonl", "seal.json", "model.safetensors.part"} <= {path.name for path in files}
    rng = random.Random(changes)
    for index in range(changes):
        out = tmp_path / "out"
        shutil.copytree(state, out)
        file = files[index % len(files)]
        copy = out / file.relative_to(state)
        data = bytearray(copy.read_bytes())
        # Every second one of the first bytes: headers are as good as weights.
        data[rng.randrange(len(data) if index // len(files) % 2 else min(64, len(data)))] ^= 1 << rng.randrange(8)
        copy.write_bytes(data)
        ended = start(root, out).wait(DEADLINE)
        if file.name == "seal.json" and ended.code:
            assert "holds an unfinished run of another recipe" in ended.err, ended.err
            tally["refused: not this run's state"] += 1
        else:
            assert ended.code == 0, (file, ended.err)
            assert tree_hash(out) == tree_hash(root / "whole"), file
            tally[f"redone where it mattered, {SAME}"] += 1
        shutil.rmtree(out)


@pytest.mark.reliability("Crashes", "a file of the unfinished result cut short or gone")
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_lost_between_runs(root: Path, tmp_path: Path, tally: Counter[str], how: str) -> None:
    state = stopped(root, tmp_path / "state", units=1)
    for name in ("journal.jsonl", "model.safetensors.part", "hidden"):
        out = tmp_path / "out"
        shutil.copytree(state, out)
        found = out / WORK / name
        for file in found.iterdir() if found.is_dir() else [found]:
            if how == "gone":
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2)
        finish(root, out)
        shutil.rmtree(out)
        tally[f"redone where it mattered, {SAME}"] += 1


@pytest.mark.reliability("Crashes", "two processes on one output folder")
@pytest.mark.parametrize("when", ["while it runs", "at once", "once it has finished"])
def test_two_processes(root: Path, tmp_path: Path, tally: Counter[str], when: str) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"

    def wait_for_the_other() -> None:
        """Look at the folder while the first one runs, and claim it when that has finished."""
        claimed = output.claimed

        def late(*arguments: object) -> object:
            ready.write_text("looked")
            while first.running(0.0) or not (out / output.REPORT).exists():
                time.sleep(0.01)
            return claimed(*arguments)  # type: ignore[arg-type]

        output.claimed = late  # type: ignore[assignment]

    def pause() -> None:
        while not ready.exists():
            time.sleep(0.01)

    if when == "at once":
        ended = [child.wait(DEADLINE) for child in (start(root, out), start(root, out))]
    else:
        first = start(root, out, after_unit(1, pause))
        while not lines(out) and first.running(0.01):
            pass
        second = start(root, out, wait_for_the_other if when == "once it has finished" else lambda: None)
        if when == "while it runs":
            refused = second.wait(DEADLINE)
            ready.write_text("go on")
            ended = [first.wait(DEADLINE), refused]
        else:
            ended = [first.wait(DEADLINE), second.wait(DEADLINE)]
    assert sorted(child.code for child in ended) == [0, 1], [child.err for child in ended]
    loser = next(child for child in ended if child.code)
    words = {"while it runs": ("another process is writing it",), "once it has finished": ("holds a finished",)}
    assert any(text in loser.err for text in words.get(when, sum(words.values(), ()))), loser.err
    assert tree_hash(out) == tree_hash(root / "whole")
    tally["the second was refused, the first wrote what it should"] += 1
