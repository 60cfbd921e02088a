"""The output folder: may it be written, is an earlier run to be continued, and who else is at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor import files
from compressor.checkpoint.sink import WORK, write_json
from compressor.errors import RecipeError, disk_error
from compressor.files import sha256_file

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
    if not out.is_dir() or not any(out.iterdir()) or (out / WORK).is_dir():
        return
    if not (out / REPORT).is_file():
        raise RecipeError(f"{out}: is not empty and was not written by compress", "give another folder with -o")
    if not force:
        raise RecipeError(f"{out}: holds a finished checkpoint", "overwrite it with --force, or give another with -o")


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


def finish(out: Path) -> None:
    """Remove the work folder: the run is over."""
    shutil.rmtree(out / WORK)


def file_hashes(out: Path) -> dict[str, str]:
    """Return name -> SHA-256 of every file of a finished result but its report."""
    names = sorted(path.name for path in out.iterdir() if path.is_file() and path.name != REPORT)
    return {name: sha256_file(out / name) for name in names}


def _continue_or_clear(out: Path, parts: dict[str, Any], digest: str, force: bool) -> None:
    seal = out / WORK / SEAL
    if seal.is_file():
        try:
            found = json.loads(seal.read_text())
        except ValueError:
            found = {}
        if found.get("digest") == digest:
            return
        if not force:
            before = found.get("parts", {})
            differs = sorted(key for key in {*before, *parts} if before.get(key) != parts.get(key))
            raise RecipeError(
                f"{out}: holds an unfinished run of another recipe (different: {', '.join(differs) or 'unreadable'})",
                "repeat that command to continue it, start over with --force, or give another folder with -o",
            )
    for path in out.iterdir():
        if path.name != WORK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (out / WORK).iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(seal, {"digest": digest, "parts": parts})
