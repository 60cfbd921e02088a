"""Minimal pairs: two sentences that differ in one point, of which the model should find the good one more likely.

The measure of BLiMP (Warstadt et al. 2020, arXiv 1912.00582): whole-sentence log-likelihoods are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError

_KEYS = {"uid": ("uid", "UID"), "good": ("good", "sentence_good"), "bad": ("bad", "sentence_bad")}
"""Our name of each field, and the spellings that are read."""


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Read a .jsonl file of pairs: a phenomenon (`uid`), a `good` sentence and a `bad` one on each line.

    The spelling of the original BLiMP files (`UID`, `sentence_good`, `sentence_bad`) is read too; other fields are left
    out.

    Raises:
        CheckpointError: Unreadable, no line holds a pair, or one is damaged; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error}", "convert the file") from error
    pairs = [_pair(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise CheckpointError(f"{path}: holds no pairs", "each line is an object with uid, good and bad")
    return pairs


def score(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return `acc`: 1 if the good sentence is more likely, 0 if the bad one is, a half for a tie.

    A tie is no knowledge: a model that finds everything equally likely must score one half.

    Args:
        doc: The pair.
        results: Log-likelihood of the good and of the bad sentence, each with whether it is the greedy continuation.
    """
    (good, _), (bad, _) = results
    return {"acc": 0.5 if good == bad else float(good > bad)}


def _pair(line: str, where: str) -> dict[str, str]:
    hint = "each line is an object with uid, good and bad"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint) from error
    if not isinstance(row, dict):
        raise CheckpointError(f"{where}: not an object", hint)
    pair = {}
    for name, spellings in _KEYS.items():
        value = next((row[key] for key in spellings if key in row), None)
        if not isinstance(value, str) or not value.strip():
            raise CheckpointError(f"{where}: {name} is {'missing' if value is None else 'no text'}", hint)
        pair[name] = value
    if pair["good"] == pair["bad"]:
        raise CheckpointError(f"{where}: both sentences are the same", "a pair must differ")
    return pair
