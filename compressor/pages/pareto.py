"""The page of bits against divergence: every weight-only row of the default model, as a picture and as a list."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.pages.measured import MODEL, Measured, measured_rows
from compressor.pages.options import line
from compressor.pages.plot import Mark, Shape, draw, frontier

TITLE = "Bits against divergence"
HEADING = f"{MODEL}: what a bit per weight buys"
PICTURE = "pareto.svg"

COLOURS = {
    "rounding to nearest": "#7f7f7f",
    "awq": "#e69f00",
    "gptq": "#0072b2",
    "flexround": "#d55e00",
    "adaround": "#cc79a7",
    "fp4 (LLM-FP4)": "#009e73",
    "nupes": "#56b4e9",
    "AutoRound": "#1b2540",
}
"""Series -> colour: seven of Okabe and Ito's, without the yellow that white paper swallows, and ink."""

SERIES = {"rtn": "rounding to nearest", "fp4": "fp4 (LLM-FP4)"}
SHAPES: dict[Shape, str] = {"circle": "integers", "square": "4-bit floats", "diamond": "powers (NUPES' grids)"}
OTHERS = "hollow: another tool"


def pareto_rows() -> list[Measured]:
    """Return the measured rows of weights alone, by bits and divergence; pruned weights stay dense and are left out."""
    rows = [
        one
        for one in measured_rows()
        if one.model == MODEL
        and one.row.inputs is None
        and one.row.attention is None
        and one.row.prune is None
        and one.cells["bits per weight"] != "-"
    ]
    return sorted(rows, key=lambda one: (float(one.cells["bits per weight"]), one.kl, one.name))


def mark_of(one: Measured) -> Mark:
    """Return how a row is drawn."""
    fmt = str(one.row.format)
    shape: Shape = "circle" if fmt.startswith("int") else "diamond" if fmt.startswith("power") else "square"
    if one.row.tool == "autoround":
        series = "AutoRound"
    else:
        way = one.row.algorithm if one.row.tool else one.row.method
        series = SERIES.get(str(way), str(way))
    return Mark(one.name, float(one.cells["bits per weight"]), one.kl, series, shape, one.row.tool is not None)


def pareto_svg(rows: Sequence[Measured]) -> str:
    """Return the picture of some rows."""
    marks = [mark_of(one) for one in rows]
    colours = {**COLOURS, **{mark.series: "#1b2540" for mark in marks if mark.series not in COLOURS}}
    return draw(marks, colours, HEADING, SHAPES, OTHERS)


def pareto_page(rows: Sequence[Measured]) -> str:
    """Return the page of some rows, up to its end mark."""
    marks = {mark_of(one): one for one in rows}
    best = [marks[mark] for mark in frontier(list(marks))]
    text = (
        f"Every committed row of `{MODEL}` that rounds weights alone: the [tables](benchmarks.md) have perplexities, "
        "times and commands. The lower and the further left, the better. Bits are those of the "
        "compressed weights, scales included; embeddings stay in 16 bits. Marks that would cover each other stand side "
        "by side. Rows that round inputs too are on [their own page](activations.md); zeros save nothing on disk, so "
        "[pruned rows](pruning.md) are not here."
    )
    return "\n".join(
        [
            f"# {TITLE}",
            "",
            text,
            "",
            f"![KL over bits per weight, a mark for every row of the list below]({PICTURE})",
            "",
            "## The best at every size",
            "",
            "A row is here if no other one has both fewer bits and less divergence.",
            "",
            *_list(best),
            "",
            "## All rows",
            "",
            *_list(rows),
        ]
    )


def _list(rows: Sequence[Measured]) -> list[str]:
    lines = [line(["row", "bits", "KL", "processor time", "table"]), line(["---", "---:", "---:", "---:", "---"])]
    for one in rows:
        place = f"[{one.table}](../evals/bench/tables/{one.table}.md)"
        lines.append(
            line([one.name, one.cells["bits per weight"], one.cells["KL"], one.cells.get("CPU time", "-"), place])
        )
    return lines
