"""Rows that prune: what they ask for, the command it takes, and runs that go on from another row's masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.evals.bench.steps import Cost

STATE, CURVE = "compress_icbs.state", "compress_icbs.json"
"""What a search leaves beside its checkpoint."""

COST = "cost.json"


class Prune(BaseModel):
    """What is pruned before anything is rounded.

    Attributes:
        method: As `compress prune --method`.
        sparsity: Share of zeros, or of the weights that are cut out.
        pattern: `N:M`.
        macs: Share of the multiply-adds that stay.
        format: Format the same loop rounds to, or None.
        group_size: Inputs per scale of that format.
        options: Options of the method.
        after: Name of the row whose search this one continues, if its masks are still in the work folder: the result
            is that of a run of its own, its cost that of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(min_length=1)
    sparsity: float | None = Field(None, gt=0, lt=1)
    pattern: str | None = None
    macs: float | None = Field(None, gt=0, le=1)
    format: str | None = None
    group_size: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    after: str | None = None

    @model_validator(mode="after")
    def _one_amount(self) -> Prune:
        if sum(amount is not None for amount in (self.sparsity, self.pattern, self.macs)) != 1:
            raise ValueError("prune needs either a sparsity, a pattern or macs")
        if self.after is not None and "sweeps" not in self.options:
            raise ValueError("a row that continues another one needs option sweeps")
        return self

    def arguments(self, state: Path | None = None, done: int = 0) -> list[str]:
        """Return the words behind `compress prune MODEL`.

        Args:
            state: Masks to go on from instead of the options' start.
            done: Sweeps they have behind them; the option counts all.
        """
        out = ["--method", self.method]
        out += ["--sparsity", f"{self.sparsity:g}"] if self.sparsity is not None else []
        out += ["--pattern", self.pattern] if self.pattern else []
        out += ["--macs", f"{self.macs:g}"] if self.macs is not None else []
        out += ["--format", self.format] if self.format else []
        out += ["--group-size", self.group_size] if self.group_size else []
        options = dict(self.options)
        if state is not None:
            options |= {"start": str(state), "sweeps": options["sweeps"] - done}
        for key, value in options.items():
            out += ["--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        return out


def keep_state(checkpoint: Path, folder: Path, cost: Cost) -> None:
    """Copy a search's masks to where the next row finds them; nothing if there are none."""
    if not (checkpoint / STATE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (STATE, CURVE):
        shutil.copyfile(checkpoint / name, folder / name)
    (folder / COST).write_text(json.dumps(cost.to_json()), encoding="utf-8")


def found_state(folder: Path) -> tuple[Path, int, Cost] | None:
    """Return the masks another row left, the sweeps behind them, and what they took; None if there are none."""
    if not (folder / COST).is_file():
        return None
    done = len(read_curve(folder / CURVE)) - 1
    return folder / STATE, done, Cost(**json.loads((folder / COST).read_text(encoding="utf-8")))


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return what every sweep did, the starting mask first."""
    curve: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["curve"]
    return curve


def joined(first: Cost, second: Cost) -> Cost:
    """Return the cost of two commands, one after the other."""
    return Cost(
        first.seconds + second.seconds,
        first.cpu_seconds + second.cpu_seconds,
        max(first.peak_rss, second.peak_rss),
    )
