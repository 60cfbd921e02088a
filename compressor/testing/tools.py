"""Small tools for end-to-end tests: a tiny checkpoint with a tokenizer, the command line, hashes of a result."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedModel

from compressor.testing.models import tiny_tokenizer

CHANGES_BETWEEN_RUNS = ("compress_report.json", "compress_eval.json", "compress_eval_baseline.json")
"""Files that hold times and paths; everything else of a result is the same bytes in every run."""


def save_checkpoint(model: PreTrainedModel, folder: Path, *, shard_size: str = "5GB") -> Path:
    """Save a model with a tokenizer beside it, as users have it."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 4000) -> Path:
    """Write deterministic text of about this many words."""
    vocabulary = ("the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "over", "hills", "and", "stars")
    state, out = 7, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(vocabulary[(state >> 16) % len(vocabulary)])
    path.write_text(" ".join(out), encoding="utf-8")
    return path


def run_cli(
    *arguments: object, env: dict[str, str] | None = None, timeout: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `compress` in a process of its own, single-threaded so that parallel tests do not fight."""
    return subprocess.run(
        cli_command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        check=False,
    )


def cli_command(*arguments: object) -> list[str]:
    """Return the argument vector of a `compress` call with this interpreter."""
    return [sys.executable, "-m", "compressor", *(str(argument) for argument in arguments)]


def tree_hash(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for every file that must not differ between two equal runs."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in CHANGES_BETWEEN_RUNS
    }
