"""From what the tests of `tests/reliability` counted to `docs/reliability.md`.

`COMPRESS_RELIABILITY=counts.json pytest tests/reliability -m ""`, then `python -m compressor.testing.reliability
counts.json docs/reliability.md`.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from compressor.files import replace_text

SECTIONS = ("Crashes", "Hostile input", "Determinism")
BEGIN, END = "<!-- made by compressor.testing.reliability -->", "<!-- end -->"
_ROW = re.compile(r"^\| (?P<title>[^|]+) \| (?P<tried>\d+) \| (?P<outcome>[^|]+) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """What one test counted.

    Attributes:
        section: One of `SECTIONS`.
        title: The kind of fault or input.
        outcomes: What came of it -> how often.
    """

    section: str
    title: str
    outcomes: dict[str, int]


def add(path: Path, records: Iterable[Record]) -> None:
    """Add a session's counts to a file; kinds it has already are replaced, those counted twice in a session added."""
    known = {record.title: record for record in read(path)} if path.is_file() else {}
    fresh: dict[str, Record] = {}
    for record in records:
        assert record.section in SECTIONS, record
        before = fresh[record.title].outcomes if record.title in fresh else {}
        outcomes = {key: before.get(key, 0) + record.outcomes.get(key, 0) for key in {**before, **record.outcomes}}
        fresh[record.title] = Record(record.section, record.title, outcomes)
    entries = [asdict(record) for record in {**known, **fresh}.values()]
    replace_text(path, json.dumps(entries, indent=1) + "\n")


def read(path: Path) -> list[Record]:
    """Return the counts of a file."""
    return [Record(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def render(records: Iterable[Record]) -> str:
    """Return the generated part of the page."""
    records = sorted(records, key=lambda record: record.title)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    lines = [BEGIN, f"Counted on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU; {versions}."]
    for section in SECTIONS:
        lines += ["", f"### {section}", "", "| what | tried | outcome |", "|---|---|---|"]
        for record in records:
            if record.section == section:
                most_first = sorted(record.outcomes.items(), key=lambda item: (-item[1], item[0]))
                text = "; ".join(outcome if len(most_first) == 1 else f"{n} {outcome}" for outcome, n in most_first)
                lines.append(f"| {record.title} | {sum(record.outcomes.values())} | {text} |")
    return "\n".join([*lines, END])


def update(page: Path, records: Iterable[Record]) -> None:
    """Replace the generated part of a page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    replace_text(page, head + render(records) + rest.partition(END)[2])


def listed(page: Path) -> dict[str, int]:
    """Return title -> tried of the generated rows of a page."""
    part = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {match["title"]: int(match["tried"]) for match in _ROW.finditer(part)}


def marked(folder: Path) -> set[str]:
    """Return the titles that the tests of a folder are marked with."""
    titles = set()
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.reliability":
                titles.add(ast.literal_eval(node.args[1]))
    return titles


if __name__ == "__main__":
    update(Path(sys.argv[2]), read(Path(sys.argv[1])))
