"""The child that hostile input is tried in is stopped where it should be, or the tests that use it prove nothing."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from compressor.errors import CheckpointError, ResourceError
from compressor.testing.child import FORBIDDEN, Child
from compressor.testing.fuzzing import fuzz, outcome


def test_result_and_output_come_back() -> None:
    def work() -> int:
        os.write(1, b"out")
        os.write(2, b"err")
        return 3

    ended = Child(work).wait(30)
    assert (ended.code, ended.out, ended.err, ended.late) == (3, "out", "err", False)


def test_an_exception_is_told() -> None:
    ended = Child(lambda: 1 // 0).wait(30)
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.err


def test_one_that_hangs_is_killed() -> None:
    ended = Child(lambda: time.sleep(60) or 0).wait(0.2)
    assert (ended.code, ended.late) == (-signal.SIGKILL, True)


def test_one_that_eats_memory_fails() -> None:
    ended = Child(lambda: len(bytearray(1 << 30)) and 0, memory=1 << 28).wait(30)
    assert ended.code == 1
    assert "MemoryError" in ended.err


def _link_out(inside: Path, outside: Path) -> None:
    (inside / "link").symlink_to(outside)
    (inside / "link").write_text("x")


@pytest.mark.parametrize(
    ("act", "allowed"),
    [
        (lambda inside, outside: (inside / "a").write_text("x"), True),
        (lambda inside, outside: (inside / "b").mkdir(), True),
        (lambda inside, outside: outside.read_text(), True),
        (lambda inside, outside: outside.write_text("x"), False),
        (lambda inside, outside: outside.unlink(), False),
        (lambda inside, outside: outside.rename(inside / "c"), False),
        (lambda inside, outside: outside.with_name("d").mkdir(), False),
        (lambda inside, outside: (inside / ".." / outside.name).write_text("x"), False),
        (_link_out, False),
        (lambda inside, outside: subprocess.run(["true"], check=True), False),
        (lambda inside, outside: os.system("true"), False),
        (lambda inside, outside: socket.socket().connect(("127.0.0.1", 9)), False),
    ],
    ids=[
        *("write", "mkdir", "read", "write-outside", "remove-outside", "move", "mkdir-outside", "dots", "link"),
        *("program", "shell", "connection"),
    ],
)
def test_what_it_may_do(act: Callable[[Path, Path], object], allowed: bool, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("before")

    def work() -> int:
        act(inside, outside)
        return 0

    ended = Child(work, writes=[inside]).wait(30)
    assert ended.code == (0 if allowed else FORBIDDEN), ended.err
    assert outside.read_text() == "before"


def test_fuzzing_counts_and_fails(tmp_path: Path) -> None:
    def attempt(value: int) -> str:
        if value > 90:
            raise ValueError("too large")
        return "odd" if value % 2 else "even"

    def refuse(error: Exception) -> str:
        def call() -> None:
            raise error

        return outcome(call)

    places = [tmp_path, Path(tempfile.gettempdir())]
    assert fuzz([1, 2, 3], attempt, seconds=30, writes=places) == {"odd": 2, "even": 1}
    assert fuzz(st.integers(0, 90), attempt, examples=10, seconds=60, writes=places).total() == 10
    with pytest.raises(AssertionError, match=r"last input: 95[\s\S]*too large"):
        fuzz([1, 95], attempt, seconds=30, writes=places)
    assert refuse(CheckpointError("bad", "hint")) == "refused"
    for error in (CheckpointError("no hint"), ResourceError("another exit code", "hint")):
        with pytest.raises(AssertionError):
            refuse(error)
