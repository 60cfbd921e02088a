"""What the user sees: progress on stderr, tables on stdout, errors in one line with a hint."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from compressor.errors import CompressorError
from compressor.process import peak_rss

STDERR = Console(stderr=True, highlight=False)
STDOUT = Console(highlight=False)
LONGEST_MESSAGE = 2000
"""Characters of an error that are shown."""


def print_json(data: object) -> None:
    """Write one JSON object to stdout and nothing else."""
    sys.stdout.write(json.dumps(data, indent=2, sort_keys=True) + "\n")


def print_error(error: CompressorError) -> None:
    """Write an error and its hint to stderr, each on one line."""
    STDERR.print(Text.assemble(("error: ", "bold red"), _one_line(error.message)), soft_wrap=True)
    if error.hint:
        STDERR.print(Text.assemble(("hint: ", "bold"), _one_line(error.hint)), soft_wrap=True)


def _one_line(text: str) -> str:
    """Spell out control characters, which files from strangers put into names, and cut what nobody reads to its end."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST_MESSAGE])
    return shown if len(text) <= LONGEST_MESSAGE else f"{shown} ... ({len(text)} characters)"


def size(nbytes: float) -> str:
    """Return bytes as people read them: `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Return seconds as people read them: `2m 05s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def table(title: str, columns: list[str], rows: list[list[str]], text: bool = False) -> Table:
    """Build a table whose first column is text and whose others are numbers, or text too."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if text or index == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


class RichProgress:
    """Shows how far the engine is: unit k of n, error, time left, peak memory.

    A bar where stderr is a terminal; plain lines where it is a file, so that logs stay readable.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or STDERR.quiet  # processes that another one speaks for
        self.live = STDERR.is_terminal and not self.quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> RichProgress:
        if self.live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=STDERR,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def stage(self, name: str) -> None:
        """Announce a stage."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=name)
        else:
            self._line(name)

    def units(self, total: int, done: int) -> None:
        """Start the bar."""
        self._total, self._done, self._started = total, done, time.monotonic()
        if done:
            self._line(f"continuing: {done} of {total} units were finished by an earlier run")
        if self._bar:
            self._task = self._bar.add_task("compressing", total=total, completed=done)

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        """Advance by one unit."""
        self._done += 1
        error = "" if mean_error is None else f", error {mean_error:.4f}"
        memory = f"peak {size(peak_rss())}"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=f"{name}{error}, {memory}")
            return
        per_unit = (time.monotonic() - self._started) / max(self._done, 1)
        left = duration(per_unit * (self._total - self._done))
        self._line(f"[{self._done}/{self._total}] {name}{error}, {duration(seconds)}, {left} left, {memory}")

    def event(self, text: str) -> None:
        """Show an event at once; it is in the report too."""
        self._line(f"note: {text}")

    def _line(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar:
            self._bar.console.print(text, soft_wrap=True, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def report_table(report: dict[str, Any]) -> Table:
    """Return the final table of a run."""
    before, after = report["bytes_before"], report["bytes_after"]
    kept = sum(1 for row in report["rows"] if row["action"] in ("kept", "rewritten"))
    measured = any(row["output_error"] is not None for row in report["rows"])
    rows = [
        ["weights on disk", f"{size(before)} -> {size(after)} ({before / max(after, 1):.2f}x smaller)"],
        ["bits per compressed weight", f"{report['bits_per_weight']:.3f}"],
        ["tensors", f"{len(report['rows']) - kept} compressed, {kept} kept"],
        ["mean layer output error" if measured else "mean layer weight error", f"{report['mean_error'] or 0:.4f}"],
        ["time", duration(report["seconds"])],
        ["peak RAM", size(report["peak_rss"])],
        ["verified", f"relative logit difference {report['verification']['relative_error']:.1e} after reloading"],
    ]
    if report["sparsity"] is not None:
        rows.insert(2, ["zeros among compressed weights", f"{100 * report['sparsity']:.2f} %"])
    recipe = report["recipe"]
    return table(f"{report['output']}  ({recipe['method']}, {recipe['format']})", ["", "result"], rows)
