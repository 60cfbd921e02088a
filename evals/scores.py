"""Scores of one model: numbers with their standard errors, and the values per document they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; the error is None where the data is too little to give one."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return plain data."""
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True)
class Model:
    """What was evaluated.

    Attributes:
        name: As the user wrote it.
        commit: Commit of the Hub revision, or None for local models.
        fingerprint: Hash over the files' content; equal fingerprints mean equal models.
        execution_path: What computed the linear layers, as `runtime.execution_path` says it.
        dtype: Dtype of the computation, e.g. `float32`.
    """

    name: str
    commit: str | None
    fingerprint: str
    execution_path: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "commit": self.commit,
            "fingerprint": self.fingerprint,
            "execution_path": self.execution_path,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Samples:
    """Per-document (or per-segment) values of one task, in a fixed order; all columns have one length.

    Attributes:
        id: Document or segment ids, unique within the task (within its group, if there are groups).
        hash: Short hash of each document; a differing hash under the same id means other documents.
        weight: Units a value sums over: predictions of a segment, 1 for a document.
        values: Metric name -> sums over each sample's units; the metric is `sum(values) / sum(weight)`.
        group: Subtask of each sample, or None.
    """

    id: tuple[int | str, ...]
    hash: tuple[str, ...]
    weight: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    group: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.id)

    def mean(self, metric: str) -> Estimate:
        """Return a metric and its standard error over samples; values inside one sample may be correlated."""
        return weighted_mean(self.values[metric], self.weight)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data: dict[str, Any] = {
            "id": list(self.id),
            "hash": list(self.hash),
            "weight": list(self.weight),
            "values": {name: list(values) for name, values in self.values.items()},
        }
        if self.group is not None:
            data["group"] = list(self.group)
        return data


@dataclass(frozen=True)
class TaskResult:
    """One task's scores.

    Attributes:
        version: Version of the task's definition; other versions are not comparable.
        settings: What the scores depend on beyond the model: few-shot, limit, text, context.
        metrics: Metric name -> estimate over all samples.
        samples: What the metrics were computed from.
    """

    version: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Estimate]
    samples: Samples

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "version": self.version,
            "settings": dict(self.settings),
            "metrics": {name: estimate.to_json() for name, estimate in self.metrics.items()},
            "samples": self.samples.to_json(),
        }


def weighted_mean(sums: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Return the mean per unit of values known as sums over groups of units, and its standard error over the groups.

    The ratio estimator: for `G` groups with sums `S_g` over `n_g` units and `n = sum_g n_g`,
    `var = G/(G-1) * sum_g (S_g - mean * n_g)^2 / n^2`. Groups of one unit each give the plain standard error of a mean.
    With fewer than two groups there is no error to give.
    """
    total, count = sum(weights), len(sums)
    mean = math.fsum(sums) / total
    if count < 2:
        return Estimate(mean, None)
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(sums, weights, strict=True))
    return Estimate(mean, math.sqrt(count / (count - 1) * squares) / total)
