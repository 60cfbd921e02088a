"""Other tools' rows: which program makes them, what it is told, and what its report leaves to be worked out."""

from __future__ import annotations

from typing import Any

from compressor.evals.bench.row import Row

SCRIPTS = {
    "llmcompressor": "llmcompressor_row.py",
    "autoround": "autoround_row.py",
    "gptqmodel": "gptqmodel_row.py",
}
"""Tool -> program in `external/`, run with the interpreter of an environment that has the tool."""

SCALE_BITS = 16
"""Of symmetric integers in groups: one 16-bit scale per group."""


def tool_arguments(row: Row) -> list[str]:
    """Return the flags that say what a tool is to do, as its script in `external/` takes them."""
    if row.prune is not None:
        asked = row.prune
        amount = ["--pattern", asked.pattern] if asked.pattern else ["--sparsity", f"{asked.sparsity:g}"]
        return ["--algorithm", asked.method, *amount]
    assert row.format is not None
    group = ["--group-size", row.group_size] if row.group_size else []
    if row.tool == "llmcompressor":
        inputs = ["--inputs", row.inputs] if row.inputs else []
        return ["--algorithm", str(row.algorithm), "--format", row.format, *group, *inputs]
    iters = ["--iters", str(row.iters)] if row.iters is not None else []
    return ["--bits", row.format.removeprefix("int"), *iters, *group]


def bits_per_weight(row: Row, report: dict[str, Any]) -> float:
    """Return a row's bits per compressed weight; of dequantized weights, what the packed ones would take."""
    told = report.get("bits_per_weight")
    if told is not None:
        return float(told)
    return int(str(row.format).removeprefix("int")) + SCALE_BITS / int(str(row.group_size))
