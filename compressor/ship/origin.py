"""Where a compressed model comes from: the original's id, commit, licence and languages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.default_model import EMBEDDED
from compressor.errors import CheckpointError
from compressor.ship.finished import finished
from compressor.yaml_text import parse_yaml

CARD = "README.md"


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        repo: Its id on the Hub, or None if it is only known as a folder.
        revision: Commit, or None.
        licence: As the Hub writes it (`apache-2.0`), or None if it is not known.
        languages: Codes from its card.
    """

    repo: str | None
    revision: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()


def origin_of(folder: Path) -> Origin:
    """Return what the files say about the model a result was made from; nothing is fetched.

    Results of results are followed to their beginning, as long as the folders are there.

    Raises:
        CheckpointError: There is no finished result in the folder.
    """
    report = report_of(folder)
    recipe = report["recipe"]
    model, revision = str(recipe["model"]), recipe.get("source_revision")
    if model in EMBEDDED:
        return Origin(EMBEDDED[model].origin, None, EMBEDDED[model].license.lower())
    path = Path(model)
    if path.is_dir():
        if finished(path):
            return origin_of(path)
        licence, languages = _metadata(path / CARD)
        return Origin(None, None, licence, languages)
    return Origin(model.partition("@")[0], revision)


def report_of(folder: Path) -> dict[str, Any]:
    """Return the report of a finished result.

    Raises:
        CheckpointError: There is none in the folder.
    """
    report = finished(folder)
    if report is None:
        raise CheckpointError(
            f"{folder}: holds no finished result of compress", "give a folder compress quantize wrote"
        )
    return report


def _metadata(card: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return licence and languages from the metadata of a card."""
    if not card.is_file():
        return None, ()
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None, ()
    try:
        data = parse_yaml(text.split("---", 2)[1])
    except (ValueError, IndexError):
        return None, ()
    if not isinstance(data, dict):
        return None, ()
    languages = data.get("language") or ()
    languages = [languages] if isinstance(languages, str) else languages
    licence = data.get("license")
    return str(licence) if licence else None, tuple(str(code) for code in languages)
