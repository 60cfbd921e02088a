"""The evaluation file: one model's scores, with what is needed to pair them with another model's document by document.

`compress_eval.json` holds one model. Two files are compared by pairing their samples: same task, same id, same hash of
the document. Only `timing` may differ between two runs of the same evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, disk_error
from compressor.evals.fields import Fields
from compressor.evals.scores import Model, TaskResult
from compressor.files import read_bounded, replace_text

SCHEMA = "compressor-eval/1"
MAX_BYTES = 64 << 20
"""Of an evaluation file that is read: some half a million documents."""


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
        reader = Fields(where)
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
