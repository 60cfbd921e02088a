"""What lm-eval's task objects say: which documents they score, what defines them, where their files lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from inspect import getsource
from pathlib import Path
from typing import Any

from compressor.errors import UnsupportedError


def refuse_task(name: str, task: Any) -> None:
    """Refuse tasks that a text model cannot be scored on here.

    Raises:
        UnsupportedError: The task runs code, or shows more than text.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise UnsupportedError(f"task {name} runs code that the model writes", "run it with lm-eval in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise UnsupportedError(f"task {name} shows images or plays sound", "choose a task that is text only")


def chosen_documents(task: Any, limit: int | None, group_by: str | None) -> list[int]:
    """Return the indices of the documents to use: the first `limit`, of each group if there are groups."""
    documents = task.eval_docs
    if group_by is None:
        return list(range(len(documents) if limit is None else min(limit, len(documents))))
    seen: dict[str, int] = {}
    chosen = []
    for index, document in enumerate(documents):
        group = str(document[group_by])
        seen[group] = seen.get(group, 0) + 1
        if limit is None or seen[group] <= limit:
            chosen.append(index)
    return chosen


def definition_hash(tasks: Mapping[str, Any], documents: Mapping[str, list[int]]) -> str:
    """Hash what the scores depend on: each task's configuration, without paths, and its documents."""
    digest = hashlib.sha256()
    for name, task in tasks.items():
        config = dict(task.dump_config())
        config.pop("dataset_kwargs", None)
        config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
        digest.update(json.dumps([name, config], sort_keys=True, default=_describe).encode())
        chosen = set(documents[name])
        for index, document in enumerate(task.eval_docs):
            if index in chosen:
                digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _describe(value: Any) -> str:
    """Describe a function by its source and anything else by its type: never by its address in memory."""
    if callable(value):
        with contextlib.suppress(TypeError, OSError):
            return getsource(value)
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def aggregation_names(task: Any) -> dict[str, str]:
    """Return metric -> name of the function that aggregates it."""
    return {metric: getattr(function, "__name__", "?") for metric, function in task.aggregation().items()}


def absolute_files(files: Any, folder: Path) -> Any:
    """Make local paths absolute, in whatever shape the datasets library takes them."""
    if isinstance(files, str):
        return files if "://" in files else str(folder / files)
    if isinstance(files, Mapping):
        return {split: absolute_files(part, folder) for split, part in files.items()}
    return [absolute_files(part, folder) for part in files or ()]


def listed_files(files: Any) -> Iterator[str]:
    """Yield the files of such an entry."""
    if isinstance(files, str):
        yield files
    else:
        for part in files.values() if isinstance(files, Mapping) else files:
            yield from listed_files(part)
