"""What a table asks for: the model, the texts and the rows, read from YAML and checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from compressor.errors import RecipeError
from compressor.evals.bench.row import ORIGINAL, Row, Strict, TextFile
from compressor.formats import BUILDERS
from compressor.formats.activations import get_input_format

TABLES = Path(__file__).parent / "tables"
"""The project's own tables."""

RESULTS = Path(__file__).parent / "results"
"""Their results, a folder for each."""

DIGEST_CHARS = 12


class Calibration(TextFile):
    """Text the methods see."""

    samples: int = Field(ge=1)
    seq_len: int = Field(ge=2)


class EvaluationText(TextFile):
    """Text the models are scored on: so many tokens in windows, or for encoders so many sentences."""

    tokens: int | None = Field(None, ge=2)
    sentences: int | None = Field(None, ge=2)
    context: int = Field(ge=2)

    @model_validator(mode="after")
    def _one_measure(self) -> EvaluationText:
        if (self.tokens is None) == (self.sentences is None):
            raise ValueError("give tokens, or for encoders sentences")
        return self


class Planted(Strict):
    """Outlier channels in a copy of the model that computes the same; see `planted.py`."""

    channels: int = Field(4, ge=1, description="loud channels behind every norm")
    factor: float = Field(
        32.0, gt=1, description="how much louder they are: a power of two, so that nothing is rounded"
    )
    seed: int = Field(0, ge=0, description="draws the channels")

    @model_validator(mode="after")
    def _is_exact(self) -> Planted:
        if math.frexp(self.factor)[0] != 0.5:
            raise ValueError(f"factor {self.factor:g} is no power of two: the copy would not compute the same")
        return self


class Table(Strict):
    """A table.

    Attributes:
        title: Heading of the page.
        text: A paragraph under it.
        model: Embedded name, Hub id with revision, or a folder inside --data-dir.
        planted: Outlier channels that the table's model has and the named one has not, or None.
        seed: Seed of everything random, other tools' too.
        calibration: Text the methods see.
        evaluation: Text the models are scored on.
        reader: What scores our rows: `compress eval`, or stock transformers as it does other tools' rows.
        rows: In the order in which they run; the original is the first.
    """

    title: str = Field(min_length=1)
    text: str = ""
    model: str = Field(min_length=1)
    planted: Planted | None = None
    seed: int = Field(0, ge=0)
    calibration: Calibration
    evaluation: EvaluationText
    reader: Literal["compress", "stock"] = "compress"
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> Table:
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rows are called {name!r}")
        keys = [self.key(row) for row in self.rows]
        for row, key in zip(self.rows, keys, strict=True):
            if keys.count(key) > 1:
                raise ValueError(f"row {row.name!r} has the file name {key} of another row")
            if row.prune is not None and row.prune.after is not None and row.prune.after not in names:
                raise ValueError(f"row {row.name!r} goes on after {row.prune.after!r}, which is no row")
            if self.by_stock(row) and self.evaluation.sentences is not None:
                raise ValueError(f"row {row.name!r}: stock transformers scores tokens, not sentences")
        return self

    @property
    def model_name(self) -> str:
        """Name of the model that rows start from."""
        return self.model if self.planted is None else f"{self.model}-planted"

    def by_stock(self, row: Row) -> bool:
        """Return whether stock transformers scores a row; the original is always scored by `compress eval`."""
        return not row.is_original and (row.tool is not None or self.reader == "stock")

    def key(self, row: Row) -> str:
        """Return the name of a row's result file, without suffix: readable name and digest."""
        readable = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
        return f"{readable}-{self.digest(row)[:DIGEST_CHARS]}"

    def seed_of(self, row: Row) -> int:
        """Return the seed of a row's run."""
        return self.seed if row.seed is None else row.seed

    def digest(self, row: Row) -> str:
        """Return the hex SHA-256 of all that a row's result depends on: recipe, model and texts; not its name."""
        described: dict[str, Any] = {
            "model": self.model,
            "evaluation": self.evaluation.model_dump(exclude_none=True),
        }
        if self.planted is not None:
            described["planted"] = self.planted.model_dump()
        if not row.is_original:
            described["row"] = row.model_dump(
                exclude={"name": True, "seed": True, "prune": {"after"}}, exclude_defaults=True
            )
            described["calibration"] = self.calibration.model_dump(exclude_none=True)
            described["seed"] = self.seed_of(row)
            if row.tool is None and self.reader != "compress":  # other tools' rows have one reader only
                described["reader"] = self.reader
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read_table(path: Path) -> Table:
    """Read a table.

    A row whose `method`, `format` or `algorithm` is a list stands for all combinations, format by format; its name is
    made from `label` (else the method), format and group size. One with `seeds` stands for a row with each of them.

    Raises:
        RecipeError: Unreadable, not YAML, or not a table; the message names the field.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", "list the tables with: bench list") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise RecipeError(f"{path}: not a table: it needs title, model, calibration, evaluation and rows")
    rows: list[dict[str, Any]] = [{"name": ORIGINAL}]
    for index, entry in enumerate(data["rows"]):
        if not isinstance(entry, dict):
            raise RecipeError(f"{path}: rows.{index}: {entry!r} is not a mapping")
        seeds = entry.get("seeds")
        for one in _expanded({key: value for key, value in entry.items() if key != "seeds"}):
            rows.extend(
                [one] if seeds is None else [{**one, "seed": s, "name": f"{one['name']} seed {s}"} for s in seeds]
            )
    try:
        table = Table.model_validate({**data, "rows": rows})
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{path}: {_where(first['loc'], rows)}{problem}") from error
    for row in table.rows:
        _check_names(row, path)
    return table


def find_table(name: str) -> Path:
    """Return the file of a table given by path, or by the name of one of the project's own."""
    shipped = TABLES / f"{name}.yaml"
    return shipped if shipped.is_file() and not Path(name).is_file() else Path(name)


def results_folder(path: Path) -> Path:
    """Return where a table's results are kept: with the project's for its own tables, else beside the YAML."""
    path = path.resolve()
    return (RESULTS if path.parent == TABLES.resolve() else path.parent / "results") / path.stem


def _expanded(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Turn one entry of `rows` into rows."""
    if isinstance(entry.get("algorithm"), list):
        for algorithm in entry["algorithm"]:
            yield from _expanded({**entry, "algorithm": algorithm})
        return
    rest = {key: value for key, value in entry.items() if key not in ("method", "format", "label", "name")}
    if isinstance(rest.get("group_size"), int):
        rest["group_size"] = str(rest["group_size"])
    formats, methods = (
        value if isinstance(value, list) else [value] for value in (entry.get("format"), entry.get("method"))
    )
    for format, method in itertools.product(formats, methods):
        given = {key: value for key, value in (("format", format), ("method", method)) if value is not None}
        label = entry.get("label") or rest.get("tool") or method
        words = [format, f"g{rest['group_size']}" if str(rest.get("group_size", "")).isdecimal() else None]
        words += [f"per {rest['group_size']}" if rest.get("group_size") in ("tensor", "channel") else None, label]
        words += [rest.get("algorithm") if not entry.get("label") else None]
        words += [f"inputs {rest['inputs']}" if rest.get("inputs") else None]
        words += [f"attention {rest['attention']}" if rest.get("attention") else None]
        name = entry.get("name") or " ".join(str(word) for word in words if word)
        yield {**rest, **given, "name": name}


def _check_names(row: Row, path: Path) -> None:
    """Refuse a format that does not exist; a method that does not exist yet fails when its row is run."""
    if row.format is None:  # the original, and rows that only prune
        return
    if row.format not in BUILDERS:
        raise RecipeError(f"{path}: row {row.name!r}: unknown format {row.format!r}", f"one of {', '.join(BUILDERS)}")
    for name in (row.inputs, row.attention):
        if name is not None:
            get_input_format(name)


def _where(loc: tuple[int | str, ...], rows: list[dict[str, Any]]) -> str:
    if len(loc) >= 2 and loc[0] == "rows" and isinstance(loc[1], int):
        field = ".".join(str(part) for part in loc[2:])
        return f"row {rows[loc[1]].get('name')!r}: {field + ': ' if field else ''}"
    return f"{'.'.join(str(part) for part in loc)}: " if loc else ""
