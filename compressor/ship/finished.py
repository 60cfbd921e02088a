"""Finished results: their report, whether their files are those that were written, and a line about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.files import REPORT, sha256_file


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the report of a finished result; None if there is none, or an unfinished run.

    Raises:
        CheckpointError: The report is damaged.
    """
    from compressor.checkpoint.sink import WORK

    path = folder / REPORT
    if not path.is_file() or (folder / WORK).is_dir():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        report["digest"], report["files"], report["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", "start over with --force") from error
    return report


def check_intact(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise unless every file of a result has the bytes its report says.

    Raises:
        CheckpointError: A file is missing or was changed.
    """
    for name, sha256 in report["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != sha256:
            problem = "was changed after it was written" if path.is_file() else "is missing"
            raise CheckpointError(f"{path}: {problem}", "write the result again with --force")


def described(report: Mapping[str, Any]) -> str:
    """Return one line about a result."""
    megabytes = f"{report['bytes_before'] / 1e6:.1f} -> {report['bytes_after'] / 1e6:.1f} MB"
    sparsity = report.get("sparsity")
    zeros = "" if sparsity is None else f", {sparsity:.1%} zeros"
    return f"{report['output']}: {megabytes}, {report['bits_per_weight']:.3f} bits per compressed weight{zeros}"
