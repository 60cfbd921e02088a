"""The package's cache on disk: where it is, who may write to it now, and how an entry appears all at once.

An entry is either absent or complete: it is built in a temporary sibling folder and renamed into place, and a manifest
inside it lets a later process notice files that were cut short, changed or lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor.errors import ResourceError
from compressor.files import sha256_file

CACHE_VARIABLE = "COMPRESSOR_CACHE"
LOCK_SECONDS = 1800.0
"""How long to wait for another process; fetching and converting the embedded model takes well under a minute."""

_MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Return `$COMPRESSOR_CACHE`, else `$XDG_CACHE_HOME/compressor`, else `~/.cache/compressor`; it may not exist."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "compressor"
    return Path.home() / ".cache" / "compressor"


@contextlib.contextmanager
def locked(entry: Path, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of a cache entry against other processes and threads.

    The lock file lies beside the entry and stays there: removing it could let two processes lock two different files.
    The operating system releases the lock when its holder dies.

    Raises:
        ResourceError: The lock was not free within `timeout` seconds, or the cache cannot be written.
    """
    lock = FileLock(str(entry.with_name(f".{entry.name}.lock")))
    with writing(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise ResourceError(
                f"{entry}: another process has held its lock for {timeout:g} s",
                "wait for it to finish, or stop it, then run this again",
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def publishing(entry: Path) -> Iterator[Path]:
    """Yield an empty folder beside `entry`; on success it becomes `entry` in one rename, on failure it vanishes.

    Call it with the entry's lock held: it replaces an older entry and clears what killed processes left behind.

    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """
    prefix = f".{entry.name}.partial-"
    with writing(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        for leftover in entry.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = entry.parent / f"{prefix}{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            yield partial
            _write_manifest(partial)
            if entry.exists():
                shutil.rmtree(entry)
            partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_intact(entry: Path) -> bool:
    """Return whether every file of a published entry is there with the bytes it was published with.

    A file whose size and modification time are those recorded is taken as unchanged, so that the usual answer reads
    one small file; any other file is hashed.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_is_unchanged(entry / name, recorded) for name, recorded in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # an unreadable manifest is one more way of being damaged


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write under `folder` into `ResourceError`."""
    try:
        yield
    except OSError as refused:
        if refused.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(folder)).free / 1e6
            message, hint = f"{folder}: disk full ({free:.0f} MB free)", "free some space"
        elif refused.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            message, hint = f"{folder}: cannot be written: {refused}", "check its owner and permissions"
        else:
            raise
        raise ResourceError(message, f"{hint}, or set {CACHE_VARIABLE} to another folder") from refused


def _is_unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    found = path.stat()
    if found.st_size != recorded["size"]:
        return False
    return bool(found.st_mtime_ns == recorded["mtime_ns"] or sha256_file(path) == recorded["sha256"])


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        found = path.stat()
        files[path.relative_to(folder).as_posix()] = {
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "sha256": sha256_file(path),
        }
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())
