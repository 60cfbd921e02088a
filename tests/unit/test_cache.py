"""The cache: where it is, one writer at a time, and entries that are whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compressor.checkpoint.cache import cache_root, is_intact, locked, publishing, writing
from compressor.errors import ResourceError

HOLDER = (
    "import sys\nfrom pathlib import Path\nfrom compressor.checkpoint.cache import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    entry = tmp_path / "models" / "thing"
    with publishing(entry) as folder:
        (folder / "sub").mkdir()
        (folder / "a.bin").write_bytes(bytes(range(256)) * 64)
        (folder / "sub" / "b.txt").write_text("hello")
    return entry


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that holds the lock of an entry until its input ends."""
    entry = tmp_path / "entry"
    command = [sys.executable, "-c", HOLDER, str(entry)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process, entry
        process.kill()


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COMPRESSOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / "home" / ".cache" / "compressor"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "compressor"
    monkeypatch.setenv("COMPRESSOR_CACHE", "~/own")
    assert cache_root() == tmp_path / "home" / "own"


def test_published_entry_is_intact(entry: Path) -> None:
    assert is_intact(entry)
    assert (entry / "sub" / "b.txt").read_text() == "hello"
    assert [p.name for p in entry.parent.iterdir()] == ["thing"], "nothing temporary stays"


def truncate(entry: Path) -> None:
    os.truncate(entry / "a.bin", 100)


def flip_a_bit(entry: Path) -> None:
    before = (entry / "a.bin").stat()
    data = bytearray((entry / "a.bin").read_bytes())
    data[5] ^= 1
    (entry / "a.bin").write_bytes(data)
    os.utime(entry / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def remove(entry: Path) -> None:
    (entry / "sub" / "b.txt").unlink()


def break_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"files": {')


def empty_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"files": {}}')


def list_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("[1]")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, break_manifest, empty_manifest, list_manifest])
def test_damage_is_noticed(entry: Path, damage: Callable[[Path], None]) -> None:
    damage(entry)
    assert not is_intact(entry)
    with publishing(entry) as folder:
        (folder / "new").write_text("whole again")
    assert is_intact(entry)
    assert not (entry / "a.bin").exists()


def test_copied_entry_with_new_times_is_still_intact(entry: Path) -> None:
    os.utime(entry / "a.bin", ns=(1, 1))
    assert is_intact(entry)


def test_absent_entry_is_not_intact(tmp_path: Path) -> None:
    assert not is_intact(tmp_path / "nothing")


def test_failure_leaves_the_old_entry_and_no_litter(entry: Path) -> None:
    def fail() -> None:
        with publishing(entry) as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert is_intact(entry)
    assert [p.name for p in entry.parent.iterdir()] == ["thing"]


def test_leftovers_of_killed_processes_are_cleared(entry: Path) -> None:
    leftover = entry.parent / ".thing.partial-0badcafe"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with publishing(entry) as folder:
        (folder / "a").write_text("x")
    assert not leftover.exists()


def test_lock_held_elsewhere_times_out_then_frees(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, entry = holder
    with pytest.raises(ResourceError, match=r"held its lock for 0\.1 s"), locked(entry, timeout=0.1):
        pass
    assert process.stdin is not None
    process.stdin.close()
    with locked(entry, timeout=20):
        pass


def test_lock_of_a_killed_process_is_free(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, entry = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with locked(entry, timeout=20):
        assert time.monotonic() - start < 10


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ResourceError, match="cannot be written") as caught, locked(tmp_path / "file" / "models" / "x"):
        pass
    assert "COMPRESSOR_CACHE" in caught.value.hint


def test_full_disk(tmp_path: Path) -> None:
    entry = tmp_path / "thing"

    def fill() -> None:
        with publishing(entry):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"disk full \(\d+ MB free\)"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_other_system_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), writing(tmp_path):
        tmp_path.read_bytes()
