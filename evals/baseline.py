"""Results of originals, kept under the user's cache folder: one model is compressed many times and measured once.

An entry's name is the hash of everything its numbers depend on; what it depends on stands inside it too. An entry that
is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.cache import cache_root, writing
from compressor.errors import CheckpointError, ResourceError
from compressor.evals.fields import task_from_json
from compressor.evals.scores import TaskResult
from compressor.report import Progress

FOLDER = "evaluations"


@dataclass(frozen=True)
class Entry:
    """One task's result of one model.

    Attributes:
        result: The scores.
        execution_path: What computed them.
    """

    result: TaskResult
    execution_path: str


def entry_path(key: Mapping[str, Any]) -> Path:
    """Return where the entry of a key lies, whether it exists or not."""
    return cache_root() / FOLDER / f"{_digest(key)}.json"


def recall(key: Mapping[str, Any], progress: Progress) -> Entry | None:
    """Return the entry of a key, or None if there is none; a damaged one is reported as an event.

    Args:
        key: What the result depends on: JSON data.
        progress: Who is told about a damaged entry.
    """
    path = entry_path(key)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["sha256"] != _digest(data["entry"]) or data["entry"]["key"] != json.loads(_canonical(key)):
            raise ValueError("its content does not fit its hash")
        return Entry(task_from_json(data["entry"]["result"], str(path)), str(data["entry"]["execution_path"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        progress.event(f"{path}: damaged ({str(error).splitlines()[0]}); evaluated again")
        return None


def remember(key: Mapping[str, Any], entry: Entry, progress: Progress) -> None:
    """Write an entry, all at once; a cache that cannot be written is an event, as the result is not lost.

    Args:
        key: What the result depends on.
        entry: The result.
        progress: Who is told that it could not be kept.
    """
    path = entry_path(key)
    content = {"key": dict(key), "result": entry.result.to_json(), "execution_path": entry.execution_path}
    try:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own for each writer: two processes may make the same entry at once.
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"sha256": _digest(content), "entry": content}, file, sort_keys=True)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
    except ResourceError as error:
        progress.event(f"the baseline's result was not kept: {error.message}")


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(data: Any) -> str:
    return hashlib.sha256(_canonical(data).encode()).hexdigest()
