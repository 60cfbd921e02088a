"""The page of a table of filter pruning.

Figures are means over seeds; what two ways differ by is taken seed by seed, since they cut the same trained model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compressor.evals.bench.machine import sentence
from compressor.evals.bench.table import results_folder
from compressor.evals.bench.vision import read_seed
from compressor.evals.bench.vision_table import VisionTable, read_vision_table

NOTHING = "-"


def render_vision(path: Path, results: Path | None = None) -> str:
    """Return the page of a table.

    Raises:
        RecipeError: Not a table.
        CheckpointError: A result is damaged.
    """
    table = read_vision_table(path)
    folder = results or results_folder(path)
    records = [read_seed(folder / f"{table.key(seed)}.json") for seed in range(table.seeds)]
    good = [record for record in records if record is not None and record["error"] is None]
    lines = [
        f"<!-- made by `python -m compressor.evals.bench render {path.stem}`; do not edit -->",
        f"# {table.title}",
        "",
        *([table.text.strip(), ""] if table.text.strip() else []),
        _setting(table, len(good)),
    ]
    if good:
        lines += ["", *_body(table, good)]
    failures = [record for record in records if record is not None and record["error"] is not None]
    lines += ["", *(f"Seed {record['seed']} failed: {record['error']}" for record in failures)] if failures else []
    return "\n".join(lines) + "\n"


def _setting(table: VisionTable, done: int) -> str:
    return (
        f"`{table.file}`; {done} of {table.seeds} seeds. The original is trained for {table.training['epochs']} "
        f"epochs; what was cut is trained for {table.finetune['epochs']} more."
    )


_HEAD = (
    *("way", "multiply-adds", "parameters", "one image", "right after the cut", "after fine-tuning"),
    *("difference", "better in", "macro F1", "worst class"),
)


def _body(table: VisionTable, records: list[dict[str, Any]]) -> list[str]:
    originals = [record["result"]["original"] for record in records]
    head = [*_HEAD, *(f"then {name}" for name in table.formats), *(f"bytes {name}" for name in table.formats)]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    whole = [*_costs(originals), NOTHING, *_scores(originals, None), *_formats(table, originals)]
    lines.append(_line(["original", *whole]))
    for share in table.sparsities:
        base = _entries(records, table.against, share)
        for arm in table.arms:
            entries = _entries(records, arm.name, share)
            if len(entries) < len(records):
                continue
            after = [entry["finetuned"] for entry in entries]
            cut = _spread([100 * entry["pruned"]["balanced_accuracy"] for entry in entries], 1)
            against = None if arm.name == table.against else [entry["finetuned"] for entry in base]
            cells = [*_costs(after), cut, *_scores(after, against), *_formats(table, after)]
            lines.append(_line([f"{arm.name}, {share:.0%}", *cells]))
    # Not the step's own cost: a seed that was stopped, or given more ways, has only the rest in it.
    seconds = [
        sum(entry["cpu_seconds"] for key in ("arms", "roundings") for entry in record["result"].get(key, []))
        for record in records
    ]
    return [
        *lines,
        *(["", *_rounding_lines(table, records)] if table.roundings else []),
        "",
        "Accuracies are balanced (mean of the classes' recalls), in percent, on the test set; ± is the standard "
        f"deviation over seeds. Differences are to `{table.against}` at the same share of filters, seed by seed, and "
        "with how many seeds are better. Multiply-adds are those of convolutions and linear layers for one image; the "
        "time of one image is the median of many on one thread of a shared machine.",
        "",
        f"Machine: {sentence(dict(records[0]['machine']))}. Versions: "
        + ", ".join(f"{name} {number}" for name, number in sorted(records[0]["versions"].items()))
        + f". Processor time of a seed, besides training the original: {statistics.mean(seconds) / 60:.1f} minutes.",
    ]


_ROUNDED = ("network", "rounded by", "format", "balanced accuracy", "lost", "worst class", "bytes", "processor time")


def _rounding_lines(table: VisionTable, records: list[dict[str, Any]]) -> list[str]:
    """Return the table of roundings; what is lost is taken seed by seed."""
    lines = [_line(_ROUNDED), _line(["---"] * 3 + ["---:"] * (len(_ROUNDED) - 3))]
    dense = [
        {"original": record["result"]["original"]}
        | {f"{e['arm']['name']}, {e['arm']['sparsity']:.0%}": e["finetuned"] for e in record["result"]["arms"]}
        for record in records
    ]
    for network in dense[0]:
        for way in table.roundings:
            what = {"network": network, "rounding": way.model_dump()}
            found = [
                next(e for e in record["result"]["roundings"] if all(e[key] == value for key, value in what.items()))
                for record in records
            ]
            balanced = [100 * one["balanced_accuracy"] for one in found]
            lost = [100 * one[network]["balanced_accuracy"] - now for one, now in zip(dense, balanced, strict=True)]
            worst = [100 * min(one["recall"].values()) for one in found]
            size = statistics.mean(one["bytes"] for one in found) / 1e3
            spent = statistics.mean(one["cpu_seconds"] for one in found)
            cells = [_spread(balanced, 1), _spread(lost, 1), _spread(worst, 1), f"{size:,.0f} kB", f"{spent:.0f} s"]
            lines.append(_line([network, way.name, way.format, *cells]))
    return [*lines, "", "Roundings leave the stem and the classifier dense; `lost` is to the same network unrounded."]


def _entries(records: Iterable[Mapping[str, Any]], name: str, share: float) -> list[dict[str, Any]]:
    return [
        entry
        for record in records
        for entry in record["result"]["arms"]
        if entry["arm"]["name"] == name and entry["arm"]["sparsity"] == share
    ]


def _costs(measured: list[dict[str, Any]]) -> list[str]:
    mean = {key: statistics.mean(one[key] for one in measured) for key in ("macs", "parameters")}
    usual = statistics.median(one["latency"] for one in measured)  # others use the machine too
    return [f"{mean['macs'] / 1e6:.2f} M", f"{mean['parameters'] / 1e3:.0f} k", f"{usual * 1e3:.2f} ms"]


def _scores(measured: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> list[str]:
    balanced = [100 * one["balanced_accuracy"] for one in measured]
    difference = better = NOTHING
    if against is not None:
        gaps = [new - 100 * old["balanced_accuracy"] for new, old in zip(balanced, against, strict=True)]
        difference = (
            f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else f"{gaps[0]:+.1f}"
        )
        better = f"{sum(1 for gap in gaps if gap > 0)}/{len(gaps)}"
    f1 = _spread([100 * one["macro_f1"] for one in measured], 1)
    worst = _spread([100 * min(one["recall"].values()) for one in measured], 1)
    return [_spread(balanced, 1), difference, better, f1, worst]


def _formats(table: VisionTable, measured: list[dict[str, Any]]) -> list[str]:
    both = [[one["formats"][name] for one in measured] for name in table.formats]
    accuracies = [_spread([100 * one["balanced_accuracy"] for one in ones], 1) for ones in both]
    return [*accuracies, *(f"{statistics.mean(one['bytes'] for one in ones) / 1e3:,.0f} kB" for ones in both)]


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
