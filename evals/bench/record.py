"""One row's result as it is kept in the repository: a small JSON file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.evals.bench.steps import Cost, save
from compressor.evals.results import Evaluation

SCHEMA = "compressor-bench/1"


@dataclass(frozen=True)
class Record:
    """What became of one row.

    Attributes:
        name: The row's name when it ran.
        digest: What the result depends on, as `Table.digest`.
        fingerprint: SHA-256 over the original model's files.
        commands: What was run, paths left out.
        machine: Where it ran.
        versions: Of the packages that made the row; the evaluation has its own.
        error: One line if the row failed; then nothing below is set.
        weight_bytes: Bytes of all stored tensors; None where the tool's export is not the packed one.
        bits_per_weight: Of the compressed weights, scales included.
        experts: Of a mixture of experts, the fewest calibration tokens that reach one (`routed_fewest`), that one is
            calibrated on (`used_fewest`), and how many experts were topped up (`topped_up`).
        sparsity: Of pruned rows, the share of zeros among the values of the compressed layers, as written.
        curve: Of rows that search masks, what every sweep did, the starting mask first.
        cost: Step -> what it took: `quantize` (or pruning, or both), `evaluate`.
        evaluation: Scores.
    """

    name: str
    digest: str
    fingerprint: str
    commands: tuple[str, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    experts: Mapping[str, float] | None = None
    sparsity: float | None = None
    curve: list[dict[str, Any]] | None = None
    cost: Mapping[str, Cost] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = {key: value for key, value in vars(self).items() if key not in ("cost", "evaluation")}
        return {
            "schema": SCHEMA,
            **data,
            "commands": list(self.commands),
            "cost": {name: asdict(cost) for name, cost in self.cost.items()},
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }

    def write(self, path: Path) -> None:
        """Write atomically; one line per field, so that changes read well.

        Raises:
            ResourceError: The folder cannot be written.
        """
        lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in self.to_json().items()]
        save(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_record(path: Path) -> Record | None:
    """Read a row's result; None if there is none.

    Raises:
        CheckpointError: Damaged, or of another version.
    """
    if not path.is_file():
        return None
    hint = "delete it and run the row again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data.pop("schema")
        evaluation = data.pop("evaluation")
        cost = {name: Cost(**value) for name, value in data.pop("cost").items()}
        commands = tuple(data.pop("commands"))
        if schema != SCHEMA:
            raise CheckpointError(f"{path}: schema {schema!r}, this version reads {SCHEMA!r}", hint)
        scores = None if evaluation is None else Evaluation.from_json(evaluation, str(path))
        return Record(**data, commands=commands, cost=cost, evaluation=scores)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}", hint) from error
