"""The page of the calibration study: what each method loses, by what it calibrated on."""

from __future__ import annotations

from compressor.evals.bench.row import Preset, Row
from compressor.evals.bench.table import TABLES, Table, read_table
from compressor.pages.measured import page_rows
from compressor.pages.options import line

STUDY = "calibration"
"""Name of the table, and of the page."""

TITLE = "What a method calibrates on"
NOT_RUN = "not run yet"
NO_ROW = ""


def study_page() -> str:
    """Return the page, up to its end mark."""
    table = read_table(TABLES / f"{STUDY}.yaml")
    lines = [
        f"# {TITLE}",
        "",
        f"KL to the original for `{table.model}`, weights alone, by calibration set; the "
        f"[table](../evals/bench/tables/{STUDY}.md) has perplexities, times and commands. The first line is what the "
        "others change one thing of. Lower is better, ± is one standard error.",
        "",
        *study_table(table),
        "",
        "`--data` names the text, `--n-samples` and `--seq-len` say how much of it; with `--data self` the model "
        "writes it, sampled at temperature 1.",
    ]
    return "\n".join(lines)


def study_table(table: Table) -> list[str]:
    """Return calibration sets by methods, as Markdown lines."""
    cells = {row["row"]: row.get("KL", "-") for row in page_rows(TABLES / f"{STUDY}.md")}
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in table.rows:
        if not row.is_original:
            kl = cells.get(row.name, "-")
            columns.setdefault(column_of(row))
            found.setdefault(set_of(row, table), {})[column_of(row)] = NOT_RUN if kl == "-" else kl
    head = ["calibration set", *columns]
    lines = [line(head), line(["---", *["---:"] * len(columns)])]
    return lines + [line([name, *(values.get(c, NO_ROW) for c in columns)]) for name, values in found.items()]


def column_of(row: Row) -> str:
    """Return the heading of a row's column: what is done, whatever it is calibrated on."""
    options = "".join(f" {name}={value}" for name, value in row.options.items())
    return f"`{row.method}`{options}, {row.format}"


def set_of(row: Row, table: Table) -> str:
    """Return what a row is calibrated on, in words."""
    usual = table.calibration
    amount = f"{row.samples or usual.samples} x {row.seq_len or usual.seq_len} tokens"
    if isinstance(row.text, Preset):
        return f"{amount}, `{row.text.preset}`"
    text = row.text or usual
    part = "" if text.part is None else f", its last {1 - text.part[0]:.0%}"
    return f"{amount}, `{text.file}`{part}"
