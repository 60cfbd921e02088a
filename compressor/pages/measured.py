"""Measured rows, read from the committed pages of results, by the method that made them.

A row is quoted as its page has it; what has not been run is not there.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from compressor.evals.bench.row import Row
from compressor.evals.bench.table import TABLES, read_table
from compressor.evals.bench.vision_table import is_vision

MODEL = "smollm2-135m"
"""The model whose rows say what a method costs."""

FIRST = ("weight-only", "learned-rounding")
"""Pages in which a row that several tables share is quoted; the others follow by name."""

LAST = ("peers",)
"""Pages whose rows are quoted only where no other page has them."""

APART = ("calibration",)
"""Tables that vary what others hold fixed, and score fewer tokens: their rows are no evidence for a method."""

COST = "CPU time"
_NONE = ("-", "")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True)
class Measured:
    """One row that was run.

    Attributes:
        table: Name of its table.
        model: The table's model.
        row: What was asked for.
        name: Its name on the page.
        cells: Heading -> what the page says.
    """

    table: str
    model: str
    row: Row
    name: str
    cells: dict[str, str]

    @property
    def method(self) -> str | None:
        """The method the row is evidence for: the one that rounds, else the one that prunes; None for other tools."""
        if self.row.tool is not None or self.row.is_original:
            return None
        return self.row.method or (self.row.prune.method if self.row.prune else None)

    @property
    def grid(self) -> tuple[object, ...]:
        """What rows must share to be compared: model, grids of weights and inputs, and what was pruned."""
        prune = self.row.prune
        pruned = None if prune is None else (prune.sparsity, prune.pattern, prune.format, prune.group_size)
        return (self.model, self.row.format, self.row.group_size, self.row.inputs, pruned)

    @property
    def kl(self) -> float:
        """KL divergence to the original, without its error."""
        return float(self.cells["KL"].split("±")[0].replace(",", ""))


@functools.cache
def measured_rows() -> tuple[Measured, ...]:
    """Return every row of ours and of other tools that has a KL divergence, each once, table by table."""
    paths = {path.stem: path for path in sorted(TABLES.glob("*.yaml")) if not is_vision(path)}
    paths = {name: path for name, path in paths.items() if name not in APART}
    found: dict[tuple[str, str], Measured] = {}
    for name in sorted(paths, key=_place):
        page = paths[name].with_suffix(".md")
        if not page.is_file():
            continue
        table = read_table(paths[name])
        for cells in page_rows(page):
            row = next((row for row in table.rows if _is_line_of(cells["row"], row)), None)
            if row is None or row.is_original or cells.get("KL", "-") in _NONE:
                continue
            measured = Measured(name, table.model, row, cells["row"], cells)
            found.setdefault((table.model, cells["row"]), measured)
    return tuple(found.values())


def _place(name: str) -> tuple[int, str]:
    """Return where a page comes in the order in which pages are read."""
    return (FIRST.index(name) if name in FIRST else len(FIRST) + (name in LAST), name)


def original_perplexity(table: str) -> str:
    """Return the perplexity of a table's model as it is, as its page has it."""
    rows = page_rows(TABLES / f"{table}.md")
    return next((cells["perplexity"] for cells in rows if cells["row"] == "original"), "-")


def page_rows(page: Path) -> list[dict[str, str]]:
    """Return the lines of a page's tables as heading -> cell; only tables that begin with a column `row`."""
    rows: list[dict[str, str]] = []
    head: list[str] | None = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if head is None:
            head = cells if cells[0] == "row" else []
        elif head and not set(cells[0]) <= set("-: "):
            rows.append(dict(zip(head, cells, strict=False)))
    return rows


def _is_line_of(name: str, row: Row) -> bool:
    """Return whether a line of a page is this row, or the one of all its seeds."""
    return row.name == name or re.fullmatch(re.escape(name) + r" seed \d+", row.name) is not None


def seconds(text: str) -> int:
    """Return a time as pages write it (`2 m 05 s`) in seconds."""
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+) ([hms])", text))


def cost(method: str) -> str | None:
    """Return the processor time a method took for `MODEL`, e.g. `2-3 min`; None if it was not measured."""
    mine = [
        seconds(one.cells[COST])
        for one in measured_rows()
        if one.method == method and one.model == MODEL and one.row.inputs is None and one.cells.get(COST, "-") != "-"
    ]
    if not mine:
        mine = [
            seconds(one.cells[COST])
            for one in measured_rows()
            if one.method == method and one.model == MODEL and one.cells.get(COST, "-") != "-"
        ]
    if not mine:
        return None
    low, high = min(mine), max(mine)
    if high < 60:
        return f"{low} s" if low == high else f"{low}-{high} s"
    ends = [max(round(low / 60), 1), round(high / 60)]
    return f"{ends[0]} min" if ends[0] == ends[1] else f"{ends[0]}-{ends[1]} min"
