"""From lm-eval's per-document logs to metrics with standard errors and samples that can be paired."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import VerificationError
from compressor.evals.perplexity import exponential
from compressor.evals.scores import Estimate, Samples, weighted_mean

NLL = "nll"

_PER_UNIT = ("weighted_perplexity", "bits_per_byte")
"""Aggregations of `(log-likelihood, units)` pairs."""


@dataclass
class _Column:
    """One metric over all documents, still with lm-eval's values."""

    aggregation: str
    values: list[Any]


def collect(
    name: str, found: Mapping[str, Any], aggregations: Mapping[str, Mapping[str, str]], group_by: str | None
) -> tuple[dict[str, Estimate], Samples]:
    """Read lm-eval's result of one task, or of several that form a group.

    A group's metric is the mean over all its documents; only metrics that every task of it has are kept. Means keep
    their values as samples. Perplexities keep `nll`, with bytes as weights where lm-eval counts bytes. Other metrics
    (F1, BLEU, ...) keep lm-eval's number without an error, in single tasks only.

    Args:
        name: For errors.
        found: What lm-eval's `evaluate` returned, samples included.
        aggregations: Task -> metric -> name of the aggregating function.
        group_by: Field of the documents that is the sample's group; groups of several tasks are grouped by task.

    Raises:
        VerificationError: A value that is not finite.
    """
    ids: list[int | str] = []
    hashes: list[str] = []
    groups: list[str] = []
    columns: dict[str, _Column] = {}
    for count, (task, rows) in enumerate(found["samples"].items()):
        documents = _documents(rows)
        part = _columns(documents, aggregations[task])
        columns = part if count == 0 else _joined(columns, part)
        ids += [row["doc_id"] for row in documents.values()]
        hashes += [_hash(row) for row in documents.values()]
        groups += [str(row["doc"][group_by]) if group_by else task for row in documents.values()]
    several = len(found["samples"]) > 1
    own = next(iter(found["results"].values())) if not several else {}
    values, weights = _values(name, columns)
    samples = Samples(
        id=tuple(ids),
        hash=tuple(hashes),
        weight=weights,
        values=values,
        group=tuple(groups) if group_by or several else None,
    )
    return _metrics(columns, samples, own), samples


def _documents(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Merge the rows of one document, which lm-eval logs once per filter; metrics are called `metric,filter` then."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        suffix = "" if row["filter"] == "none" else f",{row['filter']}"
        entry = merged.setdefault(row["doc_id"], {**row, "scores": {}})
        entry["scores"].update({metric + suffix: row[metric] for metric in row["metrics"]})
    return dict(sorted(merged.items()))


def _columns(documents: Mapping[int, dict[str, Any]], aggregations: Mapping[str, str]) -> dict[str, _Column]:
    names = {metric: None for row in documents.values() for metric in row["scores"]}
    out = {}
    for metric in names:
        values = [row["scores"].get(metric) for row in documents.values()]
        kind = aggregations.get(metric.partition(",")[0], "mean")
        complete = all(metric in row["scores"] for row in documents.values())
        out[metric] = _Column(kind if complete and _fits(kind, values) else "other", values)
    return out


def _fits(kind: str, values: list[Any]) -> bool:
    """Return whether values are what the aggregation says: numbers, or `(log-likelihood, units)`."""
    if kind in _PER_UNIT:
        return all(isinstance(value, tuple | list) and len(value) == 2 for value in values)
    return kind in ("mean", "perplexity") and all(hasattr(value, "__float__") for value in values)


def _joined(first: Mapping[str, _Column], second: Mapping[str, _Column]) -> dict[str, _Column]:
    return {
        metric: _Column(column.aggregation, column.values + second[metric].values)
        for metric, column in first.items()
        if metric in second and column.aggregation == second[metric].aggregation != "other"
    }


def _values(name: str, columns: Mapping[str, _Column]) -> tuple[dict[str, tuple[float, ...]], tuple[int, ...]]:
    """Return the samples' values and weights: 1 for documents, bytes where all that is kept is counted by bytes."""
    n = max((len(column.values) for column in columns.values()), default=0)
    values: dict[str, tuple[float, ...]] = {}
    weights = (1,) * n
    for metric, column in columns.items():
        if column.aggregation == "mean":
            values[metric] = tuple(float(value) for value in column.values)
        elif column.aggregation == "perplexity":
            values[NLL] = tuple(-float(value) for value in column.values)
    by_bytes = next((columns[m] for m in ("byte_perplexity", "bits_per_byte") if m in columns), None)
    if not values and by_bytes is not None and by_bytes.aggregation in _PER_UNIT:
        weights = tuple(max(1, int(units)) for _, units in by_bytes.values)
        values[NLL] = tuple(-float(value) for value, _ in by_bytes.values)
    for metric, column_values in values.items():
        for index, value in enumerate(column_values):
            if not math.isfinite(value):
                raise VerificationError(f"{name}: {metric} of document {index} is {value}", "the model is broken")
    return values, weights


def _metrics(columns: Mapping[str, _Column], samples: Samples, own: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return every metric: from the samples where they suffice, else as lm-eval gives it."""
    metrics = {metric: weighted_mean(values, samples.weight) for metric, values in samples.values.items()}
    by_bytes = NLL in metrics and set(samples.weight) != {1}
    for metric, column in columns.items():
        if column.aggregation == "perplexity" or (metric == "byte_perplexity" and by_bytes):
            metrics[metric] = exponential(metrics[NLL])
        elif metric == "bits_per_byte" and by_bytes:
            nats = metrics[NLL]
            error = None if nats.standard_error is None else nats.standard_error / math.log(2)
            metrics[metric] = Estimate(nats.value / math.log(2), error)
        elif metric not in metrics:
            key = metric if "," in metric else f"{metric},none"
            if isinstance(own.get(key), int | float) and math.isfinite(own[key]):
                metrics[metric] = Estimate(float(own[key]), None)
    return metrics


def _hash(row: Mapping[str, Any]) -> str:
    """Hash the document as the model saw it: prompt and target included."""
    return hashlib.sha256(
        "\0".join(row[key] for key in ("doc_hash", "prompt_hash", "target_hash")).encode()
    ).hexdigest()[:16]
