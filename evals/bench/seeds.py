"""The part of a page about rows that were made with several seeds: mean and standard deviation over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from compressor.evals.bench.record import Record
from compressor.evals.bench.row import Row
from compressor.evals.bench.table import Table

HEAD = (
    "row",
    "seeds",
    "bits per weight",
    "perplexity",
    "KL",
    "top-1 agreement",
    "router top-k agreement",
    "router KL",
    "fewest tokens of an expert: routed, used",
    "CPU time",
)

LEGEND = (
    "± is one standard deviation over the seeds, which pick the calibration windows and everything random. Router "
    "columns compare with the original, position by position, mean over layers; the last but one counts calibration "
    "tokens."
)


def seeds_section(table: Table, records: Mapping[str, Record | None]) -> list[str]:
    """Return the lines of the section; none if no row has a seed of its own."""
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.seed is not None:
            groups.setdefault(_common_name(row), []).append(row)
    if not groups:
        return []
    lines = ["", "## Over calibration seeds", "", _line(HEAD), _line(["---"] + ["---:"] * (len(HEAD) - 1))]
    for name, rows in groups.items():
        done = [found for row in rows if (found := records[row.name]) and found.evaluation is not None]
        lines.append(_line(_cells(name, len(rows), done)))
    return [*lines, "", LEGEND]


def _common_name(row: Row) -> str:
    return row.name.removesuffix(f" seed {row.seed}")


def _cells(name: str, wanted: int, done: Sequence[Record]) -> list[str]:
    if not done:
        return [name, f"0 of {wanted}", *["-"] * (len(HEAD) - 2)]
    evaluations = [record.evaluation for record in done if record.evaluation is not None]

    def over(task: str, metric: str) -> list[float]:
        return [found.tasks[task].metrics[metric].value for found in evaluations if task in found.tasks]

    experts = [record.experts for record in done if record.experts is not None]
    tokens = "-"
    if experts:
        tokens = ", ".join(f"{min(found[key] for found in experts):g}" for key in ("routed_fewest", "used_fewest"))
    bits = [record.bits_per_weight for record in done if record.bits_per_weight is not None]
    return [
        name,
        str(len(done)) if len(done) == wanted else f"{len(done)} of {wanted}",
        f"{mean(bits):.2f}" if bits else "-",
        _spread(over("perplexity", "perplexity"), 2),
        _spread(over("kl", "kl"), 4),
        _spread([100 * value for value in over("kl", "agreement")], 1, " %"),
        _spread([100 * value for value in over("routers", "router_agreement")], 1, " %"),
        _spread(over("routers", "router_kl"), 4),
        tokens,
        f"{mean(record.cost['quantize'].cpu_seconds for record in done):.0f} s",
    ]


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{deviation}{unit}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
