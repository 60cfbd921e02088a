"""The gate's verdict, kept beside the checkpoint it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, disk_error
from compressor.evals.gate import GateResult
from compressor.files import replace_text

VERDICT = "compress_gate.json"


def write_verdict(folder: Path, result: GateResult) -> None:
    """Write what the gate said of the checkpoint in `folder`.

    Raises:
        ResourceError: The folder cannot be written.
    """
    path = folder / VERDICT
    try:
        replace_text(path, json.dumps(result.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")
    except OSError as error:
        raise disk_error(error, path) from error


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """Return what the gate said (`GateResult.to_json`), or None if it was not asked.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / VERDICT
    if not path.is_file():
        return None
    try:
        verdict: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(verdict["passed"], bool) and isinstance(verdict["model"]["fingerprint"], str)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(f"{path}: is no verdict of the gate", "run compress gate again")
    return verdict
