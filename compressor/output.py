"""The output folder: may it be written, is an earlier run to be continued, and who else is at it."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor import files
from compressor.checkpoint.sink import WORK, write_json, write_text
from compressor.errors import RecipeError, disk_error
from compressor.files import sha256_file
from compressor.process import peak_rss
from compressor.ranks import Ranks
from compressor.report import RunReport

REPORT = files.REPORT
RECIPE = "compress_recipe.json"
SEAL = "seal.json"


def check_output(out: Path, force: bool) -> None:
    """Refuse a folder that holds anything but an unfinished run of ours, before any work is done.

    Raises:
        RecipeError: It is a file, or holds something already.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file, not a folder", "give another folder with -o")
    try:
        if not out.is_dir() or not any(out.iterdir()) or (out / WORK).is_dir():
            return
    except OSError as error:
        raise disk_error(error, out) from error
    if not (out / REPORT).is_file():
        raise RecipeError(f"{out}: is not empty and was not written by compress", "give another folder with -o")
    if not force:
        raise _finished(out)


def check_apart(out: Path, source: Path) -> None:
    """Refuse an output folder that is or holds the source, which an overwritten result would take away with it.

    Raises:
        RecipeError: It does.
    """
    written, read = out.resolve(), source.resolve()
    if written == read or written in read.parents:
        raise RecipeError(f"{out}: the model that is read, {source}, lies there", "give another folder with -o")


@contextmanager
def claimed(out: Path, parts: dict[str, Any], digest: str, force: bool) -> Iterator[None]:
    """Create the work folder, lock it, and make sure an unfinished run in it is this one.

    Args:
        out: The output folder.
        parts: What the digest covers, by name; says what differs when it does.
        digest: The sealed plan's digest.
        force: Throw away whatever is there.

    Raises:
        RecipeError: Another process is writing, or the unfinished run is a different one.
        ResourceError: The folder cannot be written.
    """
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, out) from error
    lock = FileLock(out / WORK / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"{out}: another process is writing it", "wait for it, or give another folder") from None
    except OSError as error:
        raise disk_error(error, out) from error
    try:
        _continue_or_clear(out, parts, digest, force)
        yield
    finally:
        lock.release()


def check_seen_by_all(out: Path, ranks: Ranks) -> None:
    """Make sure that all processes of a job see one output folder: hidden states pass between them there.

    Raises:
        RecipeError: One of them does not.
    """
    if ranks.size == 1:
        return
    mark = out / WORK / "mark"
    word = secrets.token_hex(16)
    if ranks.leads:
        write_text(mark, word)
    word = ranks.share(word)
    try:
        found = mark.read_text(encoding="ascii") == word
    except OSError:
        found = False
    seen = ranks.gather(found)
    if not all(seen):
        raise RecipeError(
            f"{out}: process {seen.index(False)} does not see what process 0 wrote there",
            "give a folder on a file system that all machines share",
        )


def conclude(out: Path, report: RunReport, events: Sequence[str], started: float) -> None:
    """Complete the report of a run, write it, and end the run; the last thing inside `claimed`.

    Args:
        out: The finished output folder.
        report: What the run says; `events`, `files`, `seconds` and `peak_rss` are completed here.
        events: What was known before it began.
        started: `time.monotonic()` when this process began.
    """
    report.events = [*events, *report.events]
    report.files = file_hashes(out)
    report.seconds = time.monotonic() - started
    report.peak_rss = max(report.peak_rss, peak_rss())
    write_json(out / REPORT, report.to_json())
    finish(out)


def finish(out: Path) -> None:
    """Remove the work folder: the run is over. Call it inside `claimed`, or a second process could continue meanwhile.

    The seal goes first: a work folder without one, beside a report, is what a process killed in here leaves.
    """
    (out / WORK / SEAL).unlink(missing_ok=True)
    shutil.rmtree(out / WORK)


def file_hashes(out: Path) -> dict[str, str]:
    """Return name -> SHA-256 of every file of a finished result but its report."""
    names = sorted(path.name for path in out.iterdir() if path.is_file() and path.name != REPORT)
    return {name: sha256_file(out / name) for name in names}


def _finished(out: Path) -> RecipeError:
    return RecipeError(f"{out}: holds a finished checkpoint", "overwrite it with --force, or give another with -o")


def _continue_or_clear(out: Path, parts: dict[str, Any], digest: str, force: bool) -> None:
    seal = out / WORK / SEAL
    if seal.is_file():
        found = _read_seal(seal)
        if found.get("digest") == digest:
            _make_unloadable(out)  # shards may have their final names already, and are about to be written again
            return
        if not force:
            before = found.get("parts")
            before = before if isinstance(before, dict) else {}
            differs = sorted(key for key in {*before, *parts} if before.get(key) != parts.get(key))
            raise RecipeError(
                f"{out}: holds an unfinished run of another recipe (different: {', '.join(differs) or 'unreadable'})",
                "repeat that command to continue it, start over with --force, or give another folder with -o",
            )
    elif (out / REPORT).is_file() and not force:  # another process finished it after this one looked, or died finishing
        finish(out)
        raise _finished(out)
    _make_unloadable(out)
    for path in (*out.iterdir(), *(out / WORK).iterdir()):
        if path.name != WORK and path != out / WORK / "lock":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(seal, {"digest": digest, "parts": parts})


def _read_seal(seal: Path) -> dict[str, Any]:
    try:
        found = json.loads(seal.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _make_unloadable(out: Path) -> None:
    """Take away what makes a folder load, before anything else in it changes."""
    for name in ("config.json", "config.json.failed", REPORT):
        (out / name).unlink(missing_ok=True)
