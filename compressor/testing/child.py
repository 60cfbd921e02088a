"""Work in a forked child: it may crash, hang, eat memory or write where it must not, and the test only hears of it.

A fork of a process that has imported everything costs milliseconds where a fresh one costs seconds.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FORBIDDEN = 97
"""Exit code of a child that tried something it may not."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "os.fork")


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code, or minus the number of the signal that ended it.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        late: It was killed because its time was over.
        seconds: How long it ran.
    """

    code: int
    out: str
    err: str
    late: bool
    seconds: float


class Child:
    """A forked child that runs a function and ends with the code it returns.

    Args:
        work: The function; an exception ends the child with code 1 and a traceback on its stderr.
        memory: Bytes of address space it may use beyond what it starts with; None for any number.
        writes: Folders and files it may write to; None for anywhere. Trying to write elsewhere, to start a program or
            to open a connection ends it with `FORBIDDEN`.
    """

    def __init__(
        self, work: Callable[[], int], *, memory: int | None = None, writes: Sequence[Path] | None = None
    ) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed by wait
        self._started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks once libraries have threads
            self.pid = os.fork()
        if not self.pid:
            self._be_the_child(work, memory, writes)
        self._handle = os.pidfd_open(self.pid)

    def _be_the_child(self, work: Callable[[], int], memory: int | None, writes: Sequence[Path] | None) -> None:
        code = 1
        try:
            for stream, file in zip((1, 2), self._files, strict=True):
                os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if memory is not None:
                limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            if writes is not None:
                _guard(writes)
            code = work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self, seconds: float = 0.0) -> bool:
        """Wait at most so long for the end; returns whether it still runs."""
        return not select.select([self._handle], [], [], seconds)[0]

    def send(self, how: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.running():
            os.kill(self.pid, how)

    def wait(self, seconds: float) -> Ended:
        """Return how it ended; after so many seconds it is killed."""
        late = self.running(seconds)
        if late:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._handle)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
            file.close()
        return Ended(os.waitstatus_to_exitcode(status), texts[0], texts[1], late, time.monotonic() - self._started)


def call_main(*arguments: object) -> int:
    """Run the command line in this process; returns its exit code."""
    from compressor.cli import app

    before = sys.argv
    sys.argv = ["compress", *(str(argument) for argument in arguments)]
    try:
        app.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def _guard(writes: Sequence[Path]) -> None:
    """Watch this process for the rest of its life, by Python's own audit events."""
    allowed = [os.path.realpath(path) for path in [*map(str, writes), "/dev/null"]]

    def inside(path: object, folder: object = -1, follow: bool = False) -> bool:
        if isinstance(path, int):
            return True
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        # A link is opened where it points to, and removed where it is.
        where = os.path.realpath(name)
        if not follow:
            where = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        return where.endswith(".pyc") or any(where == top or where.startswith(top + os.sep) for top in allowed)

    def watch(event: str, details: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = details
            bad = (
                isinstance(flags, int) and bool(flags & _WRITES) and path is not None and not inside(path, follow=True)
            )
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            bad = not inside(details[0], details[-1])
        elif event in ("os.rename", "os.link", "os.symlink"):
            bad = not inside(details[1]) or (event == "os.rename" and not inside(details[0]))
        else:
            bad = event in _PROGRAMS
        if bad:
            os.write(2, f"forbidden: {event} {details[:2]!r}\n".encode())
            os._exit(FORBIDDEN)

    sys.addaudithook(watch)
