"""The evaluation file: one model's scores, with what is needed to pair them with another model's document by document.

`compress_eval.json` holds one model. Two files are compared by pairing their samples: same task, same id, same hash of
the document. Only `timing` may differ between two runs of the same evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from compressor.errors import CheckpointError, disk_error
from compressor.files import read_bounded, replace_text

SCHEMA = "compressor-eval/1"
MAX_BYTES = 64 << 20
"""Of an evaluation file that is read: some half a million documents."""
LARGEST = 1e100
"""No score is larger, and squares of such numbers can still be added."""
MAX_WEIGHT = 2**53
"""Whole numbers up to here are exact as floats."""


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


@dataclass(frozen=True)
class Evaluation:
    """One model's evaluation: the content of an evaluation file.

    Attributes:
        model: What was evaluated.
        baseline: What `kl` and `agreement` are measured against, or None.
        versions: Package name -> version of what computed it.
        seed: Seed of few-shot choices.
        tasks: Task name -> result.
        timing: Seconds and the like; the only part that differs between two runs.
        saturation: What static scales of inputs cut off, as `Saturation.to_json`; None if there are none.
    """

    model: Model
    baseline: Model | None
    versions: Mapping[str, str]
    seed: int
    tasks: Mapping[str, TaskResult]
    timing: Mapping[str, Any] = field(default_factory=dict)
    saturation: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            **({} if self.saturation is None else {"saturation": dict(self.saturation)}),
            "schema": SCHEMA,
            "model": self.model.to_json(),
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "versions": dict(self.versions),
            "seed": self.seed,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "timing": dict(self.timing),
        }

    def write(self, path: Path) -> None:
        """Write the file atomically.

        Raises:
            ResourceError: The disk is full or the folder not writable.
        """
        try:
            replace_text(path, json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n")
        except OSError as error:
            raise disk_error(error, path) from error

    @classmethod
    def from_json(cls, data: object, where: str = "evaluation") -> Evaluation:
        """Check and convert plain data.

        Args:
            data: What `to_json` returned, after a trip through JSON.
            where: What errors call it, usually the file.

        Raises:
            CheckpointError: A field is missing, unknown or of the wrong kind; the message names it.
        """
        names = ("schema", "model", "baseline", "versions", "seed", "tasks", "timing")
        reader = _Reader(where)
        schema = reader.mapping(data, "").get("schema")
        if schema != SCHEMA:
            reader.fail("schema", f"is {schema!r}, this version reads {SCHEMA!r}")
        top = reader.fields(data, names, "", optional=("saturation",))
        baseline = top["baseline"]
        versions, tasks = (reader.mapping(top[name], name) for name in ("versions", "tasks"))
        return cls(
            model=reader.model(top["model"], "model"),
            baseline=None if baseline is None else reader.model(baseline, "baseline"),
            versions={name: reader.string(value, f"versions.{name}") for name, value in versions.items()},
            seed=reader.integer(top["seed"], "seed"),
            tasks={name: reader.task(task, f"tasks.{name}") for name, task in tasks.items()},
            timing=reader.mapping(top["timing"], "timing"),
            saturation=reader.mapping(top["saturation"], "saturation") if "saturation" in top else None,
        )

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read an evaluation file.

        Raises:
            CheckpointError: Missing, no JSON, or not of this schema; the message names file and field.
        """
        path = Path(path)
        try:
            text = read_bounded(path, MAX_BYTES)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            reason = "not text" if isinstance(error, UnicodeDecodeError) else reason
            raise CheckpointError(
                f"{path}: cannot be read: {reason}", "give a file that compress eval wrote"
            ) from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON: {error}", "run compress eval again") from error
        return cls.from_json(data, str(path))


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


def task_from_json(data: object, where: str) -> TaskResult:
    """Check and convert one task's plain data, as `TaskResult.to_json` returns it.

    Raises:
        CheckpointError: A field is missing, unknown or of the wrong kind; the message names it.
    """
    return _Reader(where).task(data, "task")


class _Reader:
    """Converts plain data to the dataclasses; every refusal names the file and the field."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, path: str, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: {path or 'the content'} {problem}", "give a file that compress eval wrote, or run it again"
        )

    def mapping(self, data: object, path: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.fail(path, f"is {_kind(data)}, not an object")
        assert isinstance(data, dict)
        return data

    def fields(self, data: object, names: tuple[str, ...], path: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
        found = self.mapping(data, path)
        for name in names:
            if name not in found:
                self.fail(f"{path}.{name}".lstrip("."), "is missing")
        for name in found:
            if name not in names and name not in optional:
                self.fail(f"{path}.{name}".lstrip("."), "is no field of this schema")
        return found

    def string(self, data: object, path: str) -> str:
        if not isinstance(data, str):
            self.fail(path, f"is {_kind(data)}, not a string")
        return str(data)

    def integer(self, data: object, path: str) -> int:
        if not isinstance(data, int) or isinstance(data, bool):
            self.fail(path, f"is {_kind(data)}, not a whole number")
        assert isinstance(data, int)
        return data

    def number(self, data: object, path: str) -> float:
        if not isinstance(data, int | float) or isinstance(data, bool):
            self.fail(path, f"is {_kind(data)}, not a number")
        assert isinstance(data, int | float)
        if isinstance(data, float) and not math.isfinite(data):
            self.fail(path, f"is {data}, not finite")
        if abs(data) > LARGEST:
            self.fail(path, "is too large for a score")
        return float(data)

    def array(self, data: object, path: str) -> list[Any]:
        if not isinstance(data, list):
            self.fail(path, f"is {_kind(data)}, not an array")
        assert isinstance(data, list)
        return data

    def model(self, data: object, path: str) -> Model:
        names = ("name", "commit", "fingerprint", "execution_path", "dtype")
        found = self.fields(data, names, path)
        commit = found["commit"]
        return Model(
            name=self.string(found["name"], f"{path}.name"),
            commit=None if commit is None else self.string(commit, f"{path}.commit"),
            fingerprint=self.string(found["fingerprint"], f"{path}.fingerprint"),
            execution_path=self.string(found["execution_path"], f"{path}.execution_path"),
            dtype=self.string(found["dtype"], f"{path}.dtype"),
        )

    def estimate(self, data: object, path: str) -> Estimate:
        found = self.fields(data, ("value", "standard_error"), path)
        error = found["standard_error"]
        if error is not None and self.number(error, f"{path}.standard_error") < 0:
            self.fail(f"{path}.standard_error", f"is {error}, below zero")
        return Estimate(
            self.number(found["value"], f"{path}.value"),
            None if error is None else self.number(error, f"{path}.standard_error"),
        )

    def samples(self, data: object, path: str) -> Samples:
        found = self.fields(data, ("id", "hash", "weight", "values"), path, optional=("group",))
        ids = self.array(found["id"], f"{path}.id")
        for index, item in enumerate(ids):
            if not isinstance(item, int | str) or isinstance(item, bool):
                self.fail(f"{path}.id[{index}]", f"is {_kind(item)}, not a whole number or a string")
        present = [name for name in found if name not in ("id", "values")]
        columns = {name: self.array(found[name], f"{path}.{name}") for name in present}
        values = {
            name: self.array(column, f"{path}.values.{name}")
            for name, column in self.mapping(found["values"], f"{path}.values").items()
        }
        lengths = {name: len(column) for name, column in columns.items()}
        lengths |= {f"values.{name}": len(column) for name, column in values.items()}
        for name, length in lengths.items():
            if length != len(ids):
                self.fail(f"{path}.{name}", f"has {length} entries for {len(ids)} ids")
        weights = [self.integer(item, f"{path}.weight[{i}]") for i, item in enumerate(columns["weight"])]
        for index, weight in enumerate(weights):
            if weight < 1:
                self.fail(f"{path}.weight[{index}]", f"is {weight}, not at least 1")
            if weight > MAX_WEIGHT:
                self.fail(f"{path}.weight[{index}]", f"is more than {MAX_WEIGHT}")
        group = tuple(self.string(item, f"{path}.group[{i}]") for i, item in enumerate(columns.get("group", [])))
        labels = group or ("",) * len(ids)
        if len(set(zip(labels, ids, strict=True))) < len(ids):
            self.fail(f"{path}.id", "holds an id twice")
        return Samples(
            id=tuple(ids),
            hash=tuple(self.string(item, f"{path}.hash[{i}]") for i, item in enumerate(columns["hash"])),
            weight=tuple(weights),
            values={
                name: tuple(self.number(item, f"{path}.values.{name}[{i}]") for i, item in enumerate(column))
                for name, column in values.items()
            },
            group=group if "group" in found else None,
        )

    def task(self, data: object, path: str) -> TaskResult:
        found = self.fields(data, ("version", "settings", "metrics", "samples"), path)
        metrics = self.mapping(found["metrics"], f"{path}.metrics")
        return TaskResult(
            version=self.string(found["version"], f"{path}.version"),
            settings=self.mapping(found["settings"], f"{path}.settings"),
            metrics={name: self.estimate(value, f"{path}.metrics.{name}") for name, value in metrics.items()},
            samples=self.samples(found["samples"], f"{path}.samples"),
        )


def _kind(data: object) -> str:
    """Name a JSON type for a message."""
    if data is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(data), "an object")
