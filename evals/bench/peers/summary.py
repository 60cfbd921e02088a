"""The summary of a table of peers as JSON: rows, versions and machines, and who is ahead in which job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.evals.bench.leads import find_leads
from compressor.evals.bench.record import Record, read_record
from compressor.evals.bench.row import Row
from compressor.evals.bench.table import read_table, results_folder

SCHEMA = "compressor-peers/1"


def summary_json(path: Path, results: Path | None, missing: Mapping[str, str]) -> str:
    """Return the summary.

    Args:
        path: The table's YAML.
        results: Folder of the row files; None is the usual one.
        missing: Tool -> why it has no environment.

    Raises:
        RecipeError: Not a table.
        CheckpointError: A row file is damaged.
    """
    table = read_table(path)
    folder = results or results_folder(path)
    records = {row.name: read_record(folder / f"{table.key(row)}.json") for row in table.rows}
    data = {
        "schema": SCHEMA,
        "title": table.title,
        "model": table.model_name,
        "missing_tools": dict(missing),
        "rows": [_row(row, records[row.name]) for row in table.rows],
        "jobs": [lead.to_json() for lead in find_leads(table, records)],
    }
    return json.dumps(data, indent=2) + "\n"


def _row(row: Row, record: Record | None) -> dict[str, Any]:
    data: dict[str, Any] = {"name": row.name, "tool": None if row.is_original else row.tool or "compressor"}
    if record is None or record.evaluation is None:
        return {**data, "error": "not run" if record is None else record.error}
    metrics = {name: value for task in record.evaluation.tasks.values() for name, value in task.metrics.items()}
    return {
        **data,
        "commands": list(record.commands),
        "versions": dict(record.versions),
        "machine": dict(record.machine),
        "weight_bytes": record.weight_bytes,
        "bits_per_weight": record.bits_per_weight,
        "sparsity": record.sparsity,
        "scores": {
            name: {"value": estimate.value, "standard_error": estimate.standard_error}
            for name, estimate in metrics.items()
        },
        "read_by": record.evaluation.model.execution_path,
        "cost": {step: cost.to_json() for step, cost in record.cost.items()},
    }
