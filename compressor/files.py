"""Small things about files that several layers need."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

PIECE_BYTES = 1 << 20
REPORT = "compress_report.json"
"""What a run leaves beside its checkpoint; a folder that has it was written by this package."""


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably: a reader sees the old file or the new one.

    Raises:
        OSError: It cannot be written; nothing is left behind and the old file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_bounded(path: Path, limit: int) -> str:
    """Read a UTF-8 text file that may come from a stranger.

    Args:
        path: A regular file: pipes and devices, which may never end, are refused.
        limit: Bytes; a larger file is refused before any of it is read.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: Larger than `limit`, or not UTF-8.
    """
    if not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            raise OSError(errno.EINVAL, "not a regular file")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.stat().st_size} bytes, at most {limit} are read")
    return data.decode("utf-8")
