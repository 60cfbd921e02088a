"""The table of measured runs, from their result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.evals.scale.cost import predict, predict_shared

PROCESSES = (2, 8)
"""Numbers of processes the page counts for."""

RESULTS = Path(__file__).parent / "results"

_COLUMNS = (
    "run",
    "read",
    "written",
    "limit",
    "peak, most resident",
    "peak of each block, least to most",
    "hidden states on disk",
    "wall time",
    "processor time per block",
)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read every result file of a folder, by name."""
    files = sorted(folder.glob("*.json"))
    return [{"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))} for path in files]


def render(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for result in results:
        peaks = [unit["peak_rss"] for unit in result["units"][:-1]]
        blocks = len(peaks)
        cells = (
            f"`{result['name']}`",
            _gb(result["source_bytes"]),
            _gb(result["result_bytes"]),
            "" if result["limit_gb"] is None else f"{result['limit_gb']:g} GB",
            _gb(max(result["peak_rss"], result["peak_tree"])),
            f"{_gb(min(peaks))} to {_gb(max(peaks))} ({blocks} blocks)",
            _gb(result["hidden_bytes"]),
            f"{result['seconds'] / 60:.1f} min",
            f"{result['cpu_seconds'] / blocks:.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fill(page: str, results: Sequence[dict[str, Any]]) -> str:
    """Return a page with its tables made again: measured runs, models in one process, and in several.

    Raises:
        RecipeError: The page lacks the comments between which a table stands.
    """
    tables = {"measured": render(results), "models": predict(results), "processes": predict_shared(PROCESSES)}
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, found, rest = page.partition(start)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise RecipeError(f"the page has no {start.strip()} ... {end}", "add the two comments")
        page = f"{head}{start}\n{table}\n{end}{tail}"
    return page


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
