"""Who leads: for every job that both this package and another tool did, the best of each and how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.evals.bench.record import Record
from compressor.evals.bench.row import Row
from compressor.evals.bench.table import Table
from compressor.evals.paired import paired_difference
from compressor.evals.scores import Estimate

CLEAR = 2.0
"""Standard errors from which a difference counts."""

HEAD = ("job", "best of ours", "KL", "CPU time", "best of the others", "KL", "CPU time", "difference", "ahead")


@dataclass(frozen=True)
class Lead:
    """The best results of one job.

    Attributes:
        job: What was asked for, in words.
        ours: Our record with the least KL.
        theirs: The others' record with the least KL.
        difference: KL of ours minus theirs, paired segment by segment.
    """

    job: str
    ours: Record
    theirs: Record
    difference: Estimate

    @property
    def ahead(self) -> str:
        """`ours`, `theirs`, or `level` where the difference is within two standard errors."""
        error = self.difference.standard_error
        if error is None or abs(self.difference.value) <= CLEAR * error:
            return "level"
        return "ours" if self.difference.value < 0 else "theirs"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        difference = {"value": self.difference.value, "standard_error": self.difference.standard_error}
        names = {"ours": self.ours.name, "theirs": self.theirs.name}
        return {"job": self.job, **names, "kl_difference": difference, "ahead": self.ahead}


def job_of(row: Row) -> str:
    """Return what a row is asked to do, in words: rows with the same words can be compared."""
    words = [row.format, f"g{row.group_size}" if str(row.group_size).isdecimal() else row.group_size]
    words += [f"inputs {row.inputs}" if row.inputs else None]
    if row.prune is not None:
        words += [row.prune.pattern or f"{100 * (row.prune.sparsity or 0):g} % zeros"]
    return " ".join(word for word in words if word)


def find_leads(table: Table, records: Mapping[str, Record | None]) -> list[Lead]:
    """Return the jobs that have a finished row on both sides, in the table's order."""
    jobs: dict[str, tuple[list[Record], list[Record]]] = {}
    for row in table.rows:
        record = records[row.name]
        if row.is_original or record is None or record.evaluation is None:
            continue
        jobs.setdefault(job_of(row), ([], []))[row.tool is not None].append(record)
    leads = []
    for job, (ours, theirs) in jobs.items():
        if ours and theirs:
            best = [min(side, key=kl_of) for side in (ours, theirs)]
            samples = [record.evaluation.tasks["kl"].samples for record in best if record.evaluation is not None]
            leads.append(Lead(job, best[0], best[1], paired_difference(samples[1], samples[0], "kl")))
    return leads


def kl_of(record: Record) -> float:
    """Return a finished row's KL divergence."""
    assert record.evaluation is not None
    return record.evaluation.tasks["kl"].metrics["kl"].value


def leads_section(table: Table, records: Mapping[str, Record | None]) -> list[str]:
    """Return the lines of the section; none for tables whose rows are not all read alike."""
    leads = find_leads(table, records) if table.reader == "stock" else []
    if not leads:
        return []
    marks = ["---", "---", "---:", "---:", "---", "---:", "---:", "---:", "---"]
    lines = ["", "## Who is ahead", "", _line(HEAD), _line(marks)]
    for lead in leads:
        sides = [
            cell
            for record in (lead.ours, lead.theirs)
            for cell in (record.name, f"{kl_of(record):.4f}", f"{record.cost['quantize'].cpu_seconds:.0f} s")
        ]
        error = lead.difference.standard_error
        shown = f"{lead.difference.value:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        lines.append(_line([lead.job, *sides, shown, lead.ahead]))
    legend = (
        "The row with the least KL on each side. The difference is ours minus theirs, paired segment by segment, ± one "
        f"standard error; within {CLEAR:g} of them the two are level."
    )
    return [*lines, "", legend]


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
