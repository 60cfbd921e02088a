"""What a step of a recipe is: built and checked before anything runs, then carried out in a state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from compressor.report import Progress


@dataclass(frozen=True)
class Head:
    """What all steps of a recipe share."""

    model: str
    seed: int = 0
    trust_remote_code: bool = False


@dataclass
class State:
    """Where a run stands.

    Attributes:
        head: What all steps share.
        model: What the next compressing step reads.
        output: Folder this step writes to; None: the step names it.
        device: `auto`, `cpu`, `cuda`, ...
        force: Overwrite earlier results, and upload what was not verified or did not pass.
        records: What the steps of an earlier run left, by step.
        folder: The last checkpoint that was written; None before the first.
    """

    head: Head
    model: str
    output: Path | None
    device: str = "auto"
    force: bool = False
    records: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def result(self) -> Path:
        """The folder that is evaluated, judged and uploaded."""
        assert self.folder is not None
        return self.folder


@dataclass(frozen=True)
class Done:
    """What a step came to.

    Attributes:
        summary: One line for people.
        record: Plain data, kept beside the checkpoint.
        kept: Whether an earlier run had done it already.
        passed: False stops the run: the gate said no.
        shown: What the command line draws for it (a report, an evaluation, a verdict), or None.
    """

    summary: str
    record: dict[str, Any]
    kept: bool = False
    passed: bool = True
    shown: object = None


class Step(Protocol):
    """One step.

    Attributes:
        name: What recipes call it.
        writes: Whether it writes a checkpoint.
    """

    name: ClassVar[str]
    writes: ClassVar[bool]

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Step:
        """Check settings.

        Raises:
            RecipeError: They are not valid.
            ValidationError: So pydantic says.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return every setting, with defaults, as plain data that `build` takes."""
        ...

    def preflight(self, state: State) -> None:
        """Raise what can be known to be wrong before the first step runs."""
        ...

    def run(self, state: State, progress: Progress) -> Done:
        """Do it, or find that it is done."""
        ...
