"""Going through the steps of a recipe; a run that was stopped or failed continues at the step it was at.

Beside the checkpoint stay `compress_run.yaml`, the resolved recipe, and `compress_run.json`, what each step came to.
A step is not taken as done because a file says so: each looks whether what it would make is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.checkpoint.sink import write_json, write_text
from compressor.errors import CompressorError
from compressor.report import Progress, Silent
from compressor.ship.pipeline import Pipeline
from compressor.ship.step import Done, State, Step

RESOLVED = "compress_run.yaml"
JOURNAL = "compress_run.json"


@dataclass(frozen=True)
class StepResult:
    """One step of a run: its place, its name, what it came to, and how long it took."""

    index: int
    name: str
    done: Done
    seconds: float


class Runner:
    """One run of a recipe.

    Args:
        pipeline: The recipe.
        device: `auto`, `cpu`, `cuda`, ...
        force: Overwrite earlier results; upload what was not verified or did not pass.
    """

    def __init__(self, pipeline: Pipeline, *, device: str = "auto", force: bool = False) -> None:
        self.pipeline = pipeline
        self.state = State(pipeline.head, pipeline.head.model, pipeline.output, device, force)
        self._results: list[StepResult] = []

    @property
    def folder(self) -> Path | None:
        """The folder of the result, once a step has written it."""
        return self.state.folder

    def preflight(self) -> None:
        """Raise what can be known to be wrong before hours of work: names, rules, files, a missing token.

        Raises:
            CompressorError: The first step that cannot run says why.
        """
        for index, step in enumerate(self.pipeline.steps):
            try:
                step.preflight(self.state)
            except CompressorError as error:
                raise type(error)(f"step {index + 1}, {step.name}: {error.message}", error.hint) from error

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Yield the steps to run, in order, until one does not pass; call `run` on each."""
        for index, step in enumerate(self.pipeline.steps):
            if self._results and not self._results[-1].done.passed:
                return
            yield index, step

    def run(self, index: int, step: Step, progress: Progress) -> StepResult:
        """Run one step and note what it came to.

        Raises:
            CompressorError: The step failed; what was done before is kept.
        """
        started = time.monotonic()
        if step.writes:
            self._place(index)
        done = step.run(self.state, progress)
        result = StepResult(index, step.name, done, round(time.monotonic() - started, 2))
        self._results.append(result)
        if step.writes:
            self.state.model = str(self.state.result)
            self.state.records = {} if self._more_writers(index) else self._read_journal()
        if not self._more_writers(index):
            self._write()
        return result

    def _more_writers(self, index: int) -> bool:
        return any(step.writes for step in self.pipeline.steps[index + 1 :])

    def _place(self, index: int) -> None:
        """Say where a compressing step writes: the last one to the output folder, others beside it."""
        output = self.pipeline.output
        if output is not None and self._more_writers(index):
            output = output.with_name(f"{output.name}-{index + 1}-{self.pipeline.steps[index].name}")
        self.state.output = output

    def _read_journal(self) -> dict[str, Any]:
        try:
            data = json.loads((self.state.result / JOURNAL).read_text(encoding="utf-8"))
            return {entry["step"]: entry["record"] for entry in data["steps"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing is taken as done then

    def _write(self) -> None:
        steps = [
            {
                "step": result.name,
                "summary": result.done.summary,
                "kept": result.done.kept,
                "passed": result.done.passed,
                "seconds": result.seconds,
                "record": result.done.record,
            }
            for result in self._results
        ]
        folder = self.state.result
        write_json(folder / JOURNAL, {"version": __version__, "model": self.pipeline.head.model, "steps": steps})
        write_text(folder / RESOLVED, self.pipeline.to_yaml())


def run_pipeline(
    pipeline: Pipeline, *, device: str = "auto", force: bool = False, progress: Progress | None = None
) -> tuple[StepResult, ...]:
    """Go through a recipe; the same as `compress run`.

    Returns:
        One result per step that ran; if the gate said no, its is the last.

    Raises:
        CompressorError: A step failed; running the recipe again continues there.
    """
    runner = Runner(pipeline, device=device, force=force)
    runner.preflight()
    return tuple(runner.run(index, step, progress or Silent()) for index, step in runner.steps())
