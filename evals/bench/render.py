"""From row files to a Markdown page: the same files give the same page, and nothing else goes into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compressor.errors import CheckpointError
from compressor.evals.bench.leads import leads_section
from compressor.evals.bench.machine import sentence
from compressor.evals.bench.record import Record, read_record
from compressor.evals.bench.row import ORIGINAL, Row
from compressor.evals.bench.seeds import seeds_section
from compressor.evals.bench.table import Table, read_table, results_folder
from compressor.evals.paired import paired_difference
from compressor.evals.scores import Estimate
from compressor.evals.tasks import EMBEDDINGS

SENTENCE_HEAD = (
    "row",
    "bits per weight",
    "weights",
    "cosine",
    "5 % below",
    "nearest neighbour kept",
    "time",
    "CPU time",
    "peak memory",
)
HEAD = (
    "row",
    "bits per weight",
    "weights",
    "perplexity",
    "nll difference",
    "KL",
    "top-1 agreement",
    "time",
    "CPU time",
    "peak memory",
)
ZEROS_AT = 3
"""Place of the column that tables with pruned rows have beside these."""

NOTHING = "-"
TEXT_TASK, KL_TASK = "perplexity", "kl"


def render_table(path: Path, results: Path | None = None) -> str:
    """Return the page of a table.

    Args:
        path: The table's YAML.
        results: Folder of the row files; None is the usual one.

    Raises:
        RecipeError: Not a table.
        CheckpointError: A row file is damaged.
    """
    table = read_table(path)
    folder = results or results_folder(path)
    records = {row.name: read_record(folder / f"{table.key(row)}.json") for row in table.rows}
    original = records[table.rows[0].name]
    for row in table.rows:
        record = records[row.name]
        if record is not None and record.digest != table.digest(row):
            raise CheckpointError(f"{table.key(row)}.json holds another row", "delete it and run the row again")
    head = list(HEAD)
    if table.evaluation.sentences is not None:
        rows = [_sentence_cells(row, records[row.name]) for row in table.rows if row.seed is None]
        head = list(SENTENCE_HEAD)
    else:
        rows = [_cells(row, records[row.name], original) for row in _grouped(table.rows) if row.seed is None]
    if any(row.prune for row in table.rows):
        head.insert(ZEROS_AT, "zeros")
        shown = [row for row in _grouped(table.rows) if row.seed is None]
        rows = [_with_zeros(cells, records[row.name]) for row, cells in zip(shown, rows, strict=True)]
    lines = [
        f"<!-- made by `python -m compressor.evals.bench render {path.stem}`; do not edit -->",
        f"# {table.title}",
        "",
        *([table.text.strip(), ""] if table.text.strip() else []),
        _setting(table),
        "",
        _line(head),
        _line(["---"] + ["---:"] * (len(head) - 1)),
        *(_line(cells) for cells in rows),
        "",
        _LEGEND if table.evaluation.sentences is None else _SENTENCE_LEGEND,
        *seeds_section(table, records),
        *leads_section(table, records),
        *_failures(table, records),
        *_provenance(table, records),
    ]
    return "\n".join(lines) + "\n"


_LEGEND = (
    "± is one standard error. The nll difference (nats per token, row minus original) and KL (original to row) are "
    "paired token by token on the same text; perplexities are not, and most of their error is the choice of text. Bits "
    "per weight are those of the compressed layers, scales included. Time (by the clock, and of the processor, which "
    "hardly grows on a busy machine) and peak memory are those of the whole compressing process, imports and "
    "verification included; for the original, of its evaluation."
)


_SENTENCE_LEGEND = (
    "± is one standard error over sentences. Cosine: between a sentence's embedding before and after; one sentence in "
    "twenty is below the value beside it. Nearest neighbour kept: sentences whose nearest other sentence is that of "
    "before. Time and peak memory are those of the whole compressing process, imports and verification included; for "
    "the original, of its evaluation against itself."
)


def _model(table: Table) -> str:
    planted = table.planted
    if planted is None:
        return f"`{table.model}`"
    return (
        f"`{table.model_name}`: `{table.model}` with {planted.channels} channels behind every norm {planted.factor:g} "
        f"times as loud and the columns that read them divided by it (seed {planted.seed}); logits stay as they are"
    )


def _setting(table: Table) -> str:
    calibration, text = table.calibration, table.evaluation
    if text.sentences is not None:
        return (
            f"{_model(table)}; calibration {calibration.samples} x {calibration.seq_len} tokens of "
            f"`{calibration.file}`; scored on {text.sentences:,} sentences of `{text.file}` of up to {text.context} "
            f"tokens, mean of the last states, float32; seed {table.seed}."
        )
    return (
        f"{_model(table)}; calibration {calibration.samples} x {calibration.seq_len} tokens of `{calibration.file}`; "
        f"scored on the first {text.tokens:,} tokens of `{text.file}` in windows of {text.context:,}, float32; "
        f"seed {table.seed}."
    )


def _grouped(rows: tuple[Row, ...]) -> list[Row]:
    """Bring rows of one grid together, in the order in which grids first appear."""
    order: dict[tuple[str | None, str | None, str | None], int] = {}
    for row in rows:
        order.setdefault((row.format, row.group_size, row.inputs), len(order))
    return sorted(rows, key=lambda row: order[row.format, row.group_size, row.inputs])


def _cells(row: Row, record: Record | None, original: Record | None) -> list[str]:
    if record is None:
        return [row.name, *[NOTHING] * (len(HEAD) - 2), "not run yet"]
    if record.error is not None or record.evaluation is None:
        return [row.name, *[NOTHING] * (len(HEAD) - 2), "failed"]
    tasks = record.evaluation.tasks
    difference = kl = agreement = NOTHING
    if not row.is_original:
        kl = _estimate(tasks[KL_TASK].metrics["kl"], 4)
        agreement = _percent(tasks[KL_TASK].metrics["agreement"])
        if original is not None and original.evaluation is not None:
            base = original.evaluation.tasks[TEXT_TASK].samples
            difference = _estimate(paired_difference(base, tasks[TEXT_TASK].samples, "nll"), 4)
    cost = record.cost["evaluate" if row.is_original else "quantize"]
    return [
        row.name,
        NOTHING if record.bits_per_weight is None else f"{record.bits_per_weight:.2f}".rstrip("0").rstrip("."),
        NOTHING if record.weight_bytes is None else f"{record.weight_bytes / 1e6:,.1f} MB",
        _estimate(tasks[TEXT_TASK].metrics["perplexity"], 2),
        difference,
        kl,
        agreement,
        _duration(cost.seconds),
        _duration(cost.cpu_seconds),
        f"{cost.peak_rss / 1e9:.2f} GB",
    ]


def _sentence_cells(row: Row, record: Record | None) -> list[str]:
    """Return the cells of a row scored by sentence embeddings."""
    blank = [NOTHING] * (len(SENTENCE_HEAD) - 2)
    if record is None:
        return [row.name, *blank, "not run yet"]
    if record.error is not None or record.evaluation is None:
        return [row.name, *blank, "failed"]
    metrics = record.evaluation.tasks[EMBEDDINGS].metrics
    cost = record.cost["evaluate" if row.is_original else "quantize"]
    return [
        row.name,
        NOTHING if record.bits_per_weight is None else f"{record.bits_per_weight:.2f}".rstrip("0").rstrip("."),
        NOTHING if record.weight_bytes is None else f"{record.weight_bytes / 1e6:,.1f} MB",
        _estimate(metrics["cosine"], 4),
        _estimate(metrics["cosine_low"], 3),
        _percent(metrics["neighbour"]),
        _duration(cost.seconds),
        _duration(cost.cpu_seconds),
        f"{cost.peak_rss / 1e9:.2f} GB",
    ]


def _with_zeros(cells: list[str], record: Record | None) -> list[str]:
    """Return a row's cells with the share of zeros among them."""
    shown = NOTHING if record is None or record.sparsity is None else f"{100 * record.sparsity:.1f} %"
    return [*cells[:ZEROS_AT], shown, *cells[ZEROS_AT:]]


def _failures(table: Table, records: Mapping[str, Record | None]) -> list[str]:
    failed = [(row.name, record.error) for row in table.rows if (record := records[row.name]) and record.error]
    return ["", "Failed:", "", *(f"- {name}: {_escape(str(error))}" for name, error in failed)] if failed else []


def _provenance(table: Table, records: Mapping[str, Record | None]) -> list[str]:
    """Machines, versions and commands of the rows that have run."""
    done = [(row.name, record) for row in table.rows if (record := records[row.name]) and record.error is None]
    machines: dict[str, list[str]] = {}
    versions: dict[str, list[str]] = {}
    for name, record in done:
        machines.setdefault(sentence(dict(record.machine)), []).append(name)
        packages = ", ".join(f"{package} {number}" for package, number in sorted(record.versions.items()))
        if name != ORIGINAL:  # evaluated by the packages of the others
            versions.setdefault(packages, []).append(name)
    if not done:
        return []
    lines = ["", f"Machine: {_by_rows(machines)}."]
    lines += ["", f"Versions: {_by_rows(versions)}."] if versions else []
    lines += ["", "Commands:", "", "```console"]
    for name, record in done:
        lines += [f"# {name}", *(f"$ {command}" for command in record.commands)]
    return [*lines, "```"]


def _by_rows(groups: Mapping[str, list[str]]) -> str:
    """Join what rows have in common; the rows are named where there is more than one group."""
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in groups.items())


def _estimate(estimate: Estimate, digits: int) -> str:
    """Write a number with its error; large ones, whose error is large, with fewer digits."""
    if (size := abs(estimate.value)) >= 100:
        digits = max(0, digits - (1 if size < 1000 else 2))
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{error}"


def _percent(estimate: Estimate) -> str:
    error = "" if estimate.standard_error is None else f" ± {100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.value:.1f} %{error}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
