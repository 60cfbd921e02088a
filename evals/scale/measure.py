"""Runs `compress quantize` and watches from outside what it uses: memory by block, hidden states on disk, time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil  # type: ignore[import-untyped]

from compressor.checkpoint.sink import WORK
from compressor.checkpoint.source import INDEX, read_json
from compressor.errors import ResourceError, VerificationError
from compressor.files import REPORT

INTERVAL = 0.1
"""Seconds between two looks."""

CHILDREN_EVERY = 10
"""Looks between two searches for children, which take time: what verifies the result runs for seconds."""

_UNIT = re.compile(r"^\[\d+/\d+\] (?P<name>[^,]+)")


@dataclass
class Usage:
    """What a run used; bytes and seconds.

    Attributes:
        command: Its arguments, as a user would type them.
        source_bytes: Weights read.
        tokens: Calibration tokens, whether the method looks at them or not.
        result_bytes: Files written.
        seconds: Wall time, start and verification included.
        cpu_seconds: Processor time of the process, and of its children if they ended before the last look.
        peak_rss: Most that the process had resident, as the kernel counted.
        peak_tree: Most that the process and its children had resident together, at any look.
        units: For each unit: name, seconds, and the most resident at any look while it ran.
        hidden_bytes: Most that hidden states took on disk.
        work_left: Whether the work folder was still there at the end.
        versions: Of the libraries.
    """

    command: str
    source_bytes: int
    tokens: int = 0
    result_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    peak_tree: int = 0
    units: list[dict[str, Any]] = field(default_factory=list)
    hidden_bytes: int = 0
    work_left: bool = True
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @property
    def growth(self) -> int | None:
        """Bytes that the last block's peak lies above the second one's, or None with fewer than three blocks.

        The first block is left out: libraries load code while it runs.
        """
        peaks = [unit["peak_rss"] for unit in self.units[:-1]]  # without what lies outside the blocks
        return peaks[-1] - peaks[1] if len(peaks) >= 3 else None


def measure(
    source: Path, out: Path, arguments: Sequence[str], threads: int = 1, say: Callable[[str], None] = lambda _: None
) -> Usage:
    """Run `compress quantize SOURCE -o OUT ARGUMENTS` and return what it used.

    Args:
        source: A sharded checkpoint.
        out: Where the result goes; stays there.
        arguments: Further flags.
        threads: Threads it may use.
        say: Told every line of its progress.

    Raises:
        VerificationError: The command failed.
    """
    size = int(read_json(source / INDEX)["metadata"]["total_size"])
    usage = Usage(" ".join(["compress quantize", source.name, *arguments]), size)
    command = [sys.executable, "-m", "compressor", "quantize", str(source), "-o", str(out), *arguments]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as rest:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(command, stdout=rest, stderr=subprocess.PIPE, text=True, env=environment)
        assert child.stderr is not None
        watch = _Watch(psutil.Process(child.pid), out / WORK / "hidden", usage)
        reader = threading.Thread(target=watch.follow, args=(child.stderr, say))
        reader.start()
        try:
            while child.poll() is None:
                watch.look()
                time.sleep(INTERVAL)
        finally:
            child.kill()
            code = child.wait()
            reader.join()
    if code != 0:
        raise VerificationError(f"{usage.command}: ended with code {code}: {watch.last}", "run it by hand")
    usage.seconds = time.monotonic() - started
    usage.result_bytes = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    usage.work_left = (out / WORK).exists()
    report = read_json(out / REPORT)
    calibration = report["recipe"]["calibration"]
    usage.tokens = calibration["n_samples"] * calibration["seq_len"]
    usage.versions = report["versions"]
    return usage


def check_limit(usage: Usage, gigabytes: float) -> None:
    """Make sure that a run stayed below a limit, and left nothing behind.

    Raises:
        ResourceError: It did not.
    """
    peak = max(usage.peak_rss, usage.peak_tree)
    if peak > gigabytes * 1e9:
        raise ResourceError(f"{usage.command}: {peak / 1e9:.2f} GB were resident, the limit is {gigabytes:g} GB")
    if usage.work_left:
        raise ResourceError(f"{usage.command}: left its work folder behind")


class _Watch:
    """Looks at a process and its children, and reads its progress."""

    def __init__(self, process: Any, hidden: Path, usage: Usage) -> None:
        self._process, self._hidden, self._usage = process, hidden, usage
        self._peak = 0
        self._since = time.monotonic()
        self._children: list[Any] = []
        self._looks = 0
        self.last = ""

    def look(self) -> None:
        """Take note of what is resident and on disk now."""
        try:
            info = self._process.memory_info()
            times = self._process.cpu_times()
            tree, spent = info.rss, times.user + times.system + times.children_user + times.children_system
            self._usage.peak_rss = max(self._usage.peak_rss, _high_water(self._process.pid))
            if self._looks % CHILDREN_EVERY == 0:
                self._children = self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._looks += 1
        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                tree += child.memory_info().rss
        self._peak = max(self._peak, info.rss)
        self._usage.peak_tree = max(self._usage.peak_tree, tree)
        self._usage.cpu_seconds = max(self._usage.cpu_seconds, spent)
        self._usage.hidden_bytes = max(self._usage.hidden_bytes, _size(self._hidden))

    def follow(self, lines: TextIO, say: Callable[[str], None]) -> None:
        """Read progress until it ends; every finished unit gets what was seen since the one before."""
        for line in lines:
            self.last = line.strip() or self.last
            say(self.last)
            if found := _UNIT.match(line):
                now = time.monotonic()
                entry = {"name": found["name"], "seconds": round(now - self._since, 2), "peak_rss": self._peak}
                self._usage.units.append(entry)
                self._since, self._peak = now, 0


def _high_water(pid: int) -> int:
    """Return what the kernel counted as a process's most resident bytes; 0 where it does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files; files may come and go while it looks."""
    total = 0
    try:
        for path in folder.iterdir():
            total += path.stat().st_size
    except OSError:
        pass
    return total
