"""Reading evaluation files: every field of plain data checked and converted, every refusal with file and field."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from compressor.errors import CheckpointError
from compressor.evals.scores import Estimate, Model, Samples, TaskResult

LARGEST = 1e100
"""No score is larger, and squares of such numbers can still be added."""
MAX_WEIGHT = 2**53
"""Whole numbers up to here are exact as floats."""


def task_from_json(data: object, where: str) -> TaskResult:
    """Check and convert one task's plain data, as `TaskResult.to_json` returns it.

    Raises:
        CheckpointError: A field is missing, unknown or of the wrong kind; the message names it.
    """
    return Fields(where).task(data, "task")


class Fields:
    """Converts plain data to the dataclasses; every refusal is a `CheckpointError` naming the file and the field.

    Args:
        where: What errors call the data, usually the file. Methods also take the path of the field in it.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, path: str, problem: str) -> NoReturn:
        """Raise a `CheckpointError` that names the file and the field."""
        raise CheckpointError(
            f"{self.where}: {path or 'the content'} {problem}", "give a file that compress eval wrote, or run it again"
        )

    def mapping(self, data: object, path: str) -> dict[str, Any]:
        """Return an object."""
        if not isinstance(data, dict):
            self.fail(path, f"is {_kind(data)}, not an object")
        assert isinstance(data, dict)
        return data

    def fields(self, data: object, names: tuple[str, ...], path: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return an object that has all of `names` and nothing else but `optional`."""
        found = self.mapping(data, path)
        for name in names:
            if name not in found:
                self.fail(f"{path}.{name}".lstrip("."), "is missing")
        for name in found:
            if name not in names and name not in optional:
                self.fail(f"{path}.{name}".lstrip("."), "is no field of this schema")
        return found

    def string(self, data: object, path: str) -> str:
        """Return a string."""
        if not isinstance(data, str):
            self.fail(path, f"is {_kind(data)}, not a string")
        return str(data)

    def integer(self, data: object, path: str) -> int:
        """Return a whole number."""
        if not isinstance(data, int) or isinstance(data, bool):
            self.fail(path, f"is {_kind(data)}, not a whole number")
        assert isinstance(data, int)
        return data

    def number(self, data: object, path: str) -> float:
        """Return a finite number of a size that scores have."""
        if not isinstance(data, int | float) or isinstance(data, bool):
            self.fail(path, f"is {_kind(data)}, not a number")
        assert isinstance(data, int | float)
        if isinstance(data, float) and not math.isfinite(data):
            self.fail(path, f"is {data}, not finite")
        if abs(data) > LARGEST:
            self.fail(path, "is too large for a score")
        return float(data)

    def array(self, data: object, path: str) -> list[Any]:
        """Return an array."""
        if not isinstance(data, list):
            self.fail(path, f"is {_kind(data)}, not an array")
        assert isinstance(data, list)
        return data

    def model(self, data: object, path: str) -> Model:
        """Return what was evaluated."""
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
        """Return a number and its standard error."""
        found = self.fields(data, ("value", "standard_error"), path)
        error = found["standard_error"]
        if error is not None and self.number(error, f"{path}.standard_error") < 0:
            self.fail(f"{path}.standard_error", f"is {error}, below zero")
        return Estimate(
            self.number(found["value"], f"{path}.value"),
            None if error is None else self.number(error, f"{path}.standard_error"),
        )

    def samples(self, data: object, path: str) -> Samples:
        """Return the values per document: columns of one length, no id twice."""
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
        """Return the scores of one task."""
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
