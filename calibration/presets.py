"""Calibration text that needs no download: the interpreter's own documentation, or the model's own words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from compressor.errors import RecipeError

Split: TypeAlias = Literal["calibration", "evaluation"]

_CALIBRATION_SHARE = 0.8
_MIN_WORDS = 8
_ADORNMENT = re.compile(r"[^\w\s]{3,}")
_MARKUP_START = (">>>", "+-", "+=", "|")  # interpreter sessions and table rows
_SENTENCE_END = re.compile(r"[.:?!][)\"'\u2019\u201d]*$")


@dataclass(frozen=True)
class Preset:
    """A named source of calibration text.

    Attributes:
        summary: One line for listings.
        text: Returns the text of a split; None when the model itself writes it.
    """

    summary: str
    text: Callable[[Split], str] | None


def python_docs(split: Split) -> str:
    """Return prose from the interpreter's documentation topics, paragraphs separated by blank lines.

    Topics are sorted by name: the first 80 % are for calibration, the rest for evaluation. Topics quote each other, so
    a paragraph that calibration has seen is left out of evaluation, and none appears twice. The text is that of the
    running Python version: the same version gives the same text on every machine.

    Raises:
        RecipeError: This Python build comes without the topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as missing:
        raise RecipeError(
            f"data 'python-docs': this Python carries no documentation topics ({missing})",
            "pass --data FILE with a .txt or .jsonl file",
        ) from None
    names = sorted(topics)
    first = round(_CALIBRATION_SHARE * len(names))
    calibration = _paragraphs(topics[name] for name in names[:first])
    if split == "calibration":
        return "\n\n".join(calibration)
    seen = set(calibration)
    return "\n\n".join(p for p in _paragraphs(topics[name] for name in names[first:]) if p not in seen)


PRESETS: dict[str, Preset] = {
    "python-docs": Preset("prose from the documentation topics that come with Python (about 40k tokens)", python_docs),
    "self": Preset("text the model itself generates; no data needed, slower", None),
}


def _paragraphs(documents: Iterable[str]) -> list[str]:
    """Return the distinct prose paragraphs in order, each on one line with single spaces.

    Grammar productions, tables, interpreter sessions and heading underlines are dropped by their marks; code, headings
    and signatures because they are short or do not end like a sentence.
    """
    kept: dict[str, None] = {}
    for document in documents:
        for block in re.split(r"\n\s*\n", document):
            lines = [line.strip() for line in block.splitlines()]
            if any("::=" in line or line.startswith(_MARKUP_START) for line in lines):
                continue
            text = " ".join(" ".join(line for line in lines if not _ADORNMENT.fullmatch(line)).split())
            if len(text.split()) >= _MIN_WORDS and _SENTENCE_END.search(text):
                kept[text] = None
    return list(kept)
