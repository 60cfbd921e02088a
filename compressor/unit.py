"""One finished unit of a run: a block, or what lies outside the blocks, as its journal line says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compressor.calibration.store import Boundary
from compressor.report import Row


@dataclass
class Unit:
    """What was written and what the next unit needs.

    Attributes:
        name: The block's module name.
        sha256: Hash of the unit's tensors on disk.
        rows: Report rows of its tensors.
        events: Fall-backs and surprises.
        probe: Where the probe's hidden states behind it are; None before the first block.
        streams: Stream name -> hidden states behind it.
        metrics: What the method measured, and `seconds`.
    """

    name: str
    sha256: str
    rows: list[Row]
    events: list[str]
    probe: Boundary | None
    streams: dict[str, Boundary]
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Unit:
        """Rebuild a unit from its journal line (`dataclasses.asdict` of it).

        Raises:
            ValueError: The line is not one; nothing in it is taken on trust.
        """
        try:
            return cls._from_json(entry)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a unit: {error}") from error

    @classmethod
    def _from_json(cls, entry: dict[str, Any]) -> Unit:
        streams = {name: saved for name, data in entry["streams"].items() if (saved := _boundary(data)) is not None}
        rows = [Row(**row) for row in entry["rows"]]
        probe, events, metrics = _boundary(entry["probe"]), entry["events"], entry["metrics"]
        return cls(entry["name"], entry["sha256"], rows, events, probe, streams, metrics)


def _boundary(data: dict[str, Any] | None) -> Boundary | None:
    return None if data is None else Boundary(data["file"], tuple(data["shape"]), data["n_samples"], data["sha256"])
