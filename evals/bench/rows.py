"""Making one row: the commands it takes, and what is kept of their results."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compressor
from compressor.errors import CheckpointError
from compressor.evals.bench.inputs import Inputs, write_tokens
from compressor.evals.bench.machine import describe
from compressor.evals.bench.pruning import CURVE, found_state, joined, keep_state, read_curve
from compressor.evals.bench.record import Record
from compressor.evals.bench.row import Row
from compressor.evals.bench.steps import Cost, Surroundings, run_step
from compressor.evals.bench.table import Table
from compressor.evals.bench.tools import SCRIPTS, bits_per_weight, tool_arguments
from compressor.evals.results import Evaluation
from compressor.evals.tasks import EMBEDDINGS

EXTERNAL = Path(__file__).parent / "external"
CHECKPOINT = "checkpoint"
PRUNED = "pruned"
"""Folder of a pruned checkpoint that is going to be quantized."""

COMPRESS = (sys.executable, "-m", "compressor")


@dataclass(frozen=True)
class Bench:
    """A table about to be run on this machine.

    Attributes:
        table: The table.
        inputs: Its model and texts.
        work: Folder for what is made on the way.
        around: Threads, device, paths to hide.
        environments: Tool -> interpreter of an environment that has it.
    """

    table: Table
    inputs: Inputs
    work: Path
    around: Surroundings
    environments: Mapping[str, str]

    def make(self, row: Row, original: Record | None) -> Record:
        """Run a row's commands and return its record.

        Args:
            row: One of the table's rows.
            original: The original's record; needed for every other row.

        Raises:
            StepError: A command failed.
            CompressorError: A result cannot be used.
        """
        folder = self.work / self.table.key(row)
        folder.mkdir(parents=True, exist_ok=True)
        if row.is_original:
            return self._original(row, folder)
        assert original is not None
        assert original.evaluation is not None
        if row.tool is None:
            return self._ours(row, folder, original.evaluation)
        return self._foreign(row, folder, original.evaluation)

    def base(self, row: Row) -> Record:
        """Return what is known of a row before it has run."""
        return Record(
            name=row.name,
            digest=self.table.digest(row),
            fingerprint=self.inputs.fingerprint,
            commands=tuple(" ".join(self.around.scrub(word) for word in line) for line in self._display(row)),
            machine=describe(self.around.device, self.around.threads),
        )

    def _original(self, row: Row, folder: Path) -> Record:
        name = self.inputs.model_argument
        cost = self._run(folder, "evaluate", row, [*COMPRESS, *self._eval_arguments(name, self._beside(name))])
        evaluation = self._evaluation(folder, row.name)
        return replace(
            self.base(row),
            versions=dict(evaluation.versions),
            weight_bytes=self.inputs.weight_bytes,
            bits_per_weight=self.inputs.bits_per_weight,
            cost={"evaluate": cost},
            evaluation=evaluation,
        )

    def _ours(self, row: Row, folder: Path, original: Evaluation) -> Record:
        # --force: an unfinished result of a killed run is thrown away, or its time would be that of the rest alone.
        costs = {"quantize": self._compress(row, folder)}
        report = _read(folder / CHECKPOINT / "compress_report.json")
        curve = folder / CHECKPOINT / CURVE
        if self.table.by_stock(row):
            evaluation, costs["evaluate"] = self._scored_by_stock(row, folder, original)
        else:
            arguments = self._eval_arguments(CHECKPOINT, self.inputs.model_argument)
            costs["evaluate"] = self._run(folder, "evaluate", row, [*COMPRESS, *arguments])
            evaluation = self._evaluation(folder, row.name)
        return replace(
            self.base(row),
            versions=report["versions"],
            weight_bytes=report["bytes_after"],
            bits_per_weight=report["bits_per_weight"],
            experts=expert_tokens(report),
            sparsity=report.get("sparsity") if row.prune else None,
            curve=read_curve(curve) if curve.is_file() else None,
            cost=costs,
            evaluation=evaluation,
        )

    def _compress(self, row: Row, folder: Path) -> Cost:
        """Prune, if the row says so, and quantize, if it says so; return what both took."""
        if row.prune is None:
            return self._run(folder, "quantize", row, [*COMPRESS, *self._quantize_arguments(row)])
        pruned = CHECKPOINT if row.method is None else PRUNED
        before = found_state(self._state(self._row(row.prune.after))) if row.prune.after else None
        if before is None:
            cost = self._run(folder, "prune", row, [*COMPRESS, *self._prune_arguments(row, pruned)])
        else:
            state, done, spent = before
            arguments = self._prune_arguments(row, pruned, state, done)
            cost = joined(spent, self._run(folder, "prune", row, [*COMPRESS, *arguments]))
        keep_state(folder / pruned, self._state(row), cost)
        if row.method is None:
            return cost
        arguments = self._quantize_arguments(row, pruned)
        return joined(cost, self._run(folder, "quantize", row, [*COMPRESS, *arguments]))

    def _row(self, name: str | None) -> Row:
        return next(row for row in self.table.rows if row.name == name)

    def _state(self, row: Row) -> Path:
        """Return where a row's search leaves its masks for rows that go on."""
        return self.work / "states" / self.table.key(row)

    def _prune_arguments(self, row: Row, output: str, state: Path | None = None, done: int = 0) -> list[str]:
        assert row.prune is not None
        calibration = self.table.calibration
        arguments = ["prune", self.inputs.model_argument, *row.prune.arguments(state, done)]
        arguments += ["--data", self.inputs.text_of(row)]
        arguments += ["--n-samples", str(row.samples or calibration.samples)]
        arguments += ["--seq-len", str(row.seq_len or calibration.seq_len)]
        arguments += ["--seed", str(self.table.seed_of(row)), "--device", self.around.device]
        return [*arguments, "--output", output, "--force", "--quiet"]

    def _foreign(self, row: Row, folder: Path, original: Evaluation) -> Record:
        assert row.tool is not None
        calibration, _ = write_tokens(self.table, self.inputs, self.work / "tokens")
        making = [self.environments[row.tool], str(EXTERNAL / SCRIPTS[row.tool]), "--model", str(self.inputs.model)]
        making += ["--tokens", str(calibration), "--output", CHECKPOINT, "--report", "tool.json"]
        making += ["--seed", str(self.table.seed_of(row)), *tool_arguments(row)]
        making += ["--device", self.around.device] if row.tool != "llmcompressor" else []
        costs = {"quantize": self._run(folder, "quantize", row, making, foreign=True)}
        report = _read(folder / "tool.json")
        evaluation, costs["evaluate"] = self._scored_by_stock(row, folder, original)
        return replace(
            self.base(row),
            versions=report["versions"],
            weight_bytes=report.get("weight_bytes"),
            bits_per_weight=bits_per_weight(row, report),
            sparsity=report.get("sparsity"),
            cost=costs,
            evaluation=evaluation,
        )

    def _scored_by_stock(self, row: Row, folder: Path, original: Evaluation) -> tuple[Evaluation, Cost]:
        """Score a row's checkpoint by a program that knows nothing of this package."""
        # Imported here: transformers takes seconds, and rows scored by `compress eval` need it in that process only.
        from compressor.evals.bench.stock import evaluation_from_scores

        _, scored = write_tokens(self.table, self.inputs, self.work / "tokens")
        scoring = [sys.executable, str(EXTERNAL / "stock_score.py"), "--model", CHECKPOINT]
        scoring += ["--baseline", str(self.inputs.model), "--tokens", str(scored)]
        segment = original.tasks["perplexity"].settings["segment"]
        scoring += ["--context", str(self.table.evaluation.context), "--segment", str(segment)]
        cost = self._run(folder, "evaluate", row, [*scoring, "--report", "scores.json"])
        return evaluation_from_scores(_read(folder / "scores.json"), original, row.name, cost.seconds), cost

    def request(self, row: Row, step: str) -> dict[str, Any]:
        """Return what a step depends on, free of paths: the key for not doing it twice."""
        return {
            "step": step,
            "digest": self.table.digest(row),
            "fingerprint": self.inputs.fingerprint,
            "compressor": compressor.__version__,
        }

    def _run(self, folder: Path, step: str, row: Row, command: list[str], foreign: bool = False) -> Cost:
        return run_step(folder, step, command, self.request(row, step), self.around, foreign=foreign)

    def _quantize_arguments(self, row: Row, model: str | None = None) -> list[str]:
        calibration = self.table.calibration
        what = ["--method", str(row.method), "--format", str(row.format)]
        arguments = ["quantize", model or self.inputs.model_argument, *what]
        arguments += ["--group-size", row.group_size] if row.group_size else []
        arguments += ["--inputs", row.inputs] if row.inputs else []
        arguments += ["--attention", row.attention] if row.attention else []
        for key, value in row.options.items():
            arguments += ["--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        arguments += ["--data", self.inputs.text_of(row)]
        arguments += ["--n-samples", str(row.samples or calibration.samples)]
        arguments += ["--seq-len", str(row.seq_len or calibration.seq_len)]
        arguments += ["--seed", str(self.table.seed_of(row)), "--device", self.around.device]
        return [*arguments, "--output", CHECKPOINT, "--force", "--quiet"]

    def _eval_arguments(self, model: str, baseline: str | None) -> list[str]:
        text = self.table.evaluation
        arguments = ["eval", model, *(["--baseline", baseline] if baseline else [])]
        amount = ["--max-tokens", str(text.tokens)]
        if text.sentences is not None:
            amount = ["--tasks", EMBEDDINGS, "--limit", str(text.sentences)]
        arguments += ["--text", str(self.inputs.evaluation), *amount]
        arguments += ["--context", str(text.context), "--device", self.around.device]
        # --no-cache: time and memory are those of measuring both models, whatever has been measured before.
        return [*arguments, "--no-cache", "--output", ".", "--quiet"]

    def _beside(self, name: str) -> str | None:
        """Return what the original itself is compared with: embeddings mean nothing by themselves, so its own."""
        return None if self.table.evaluation.sentences is None else name

    def _display(self, row: Row) -> list[list[str]]:
        """Return the commands as a person would type them, without what only the runner needs."""
        if row.tool is not None:
            return [["python", SCRIPTS[row.tool], *tool_arguments(row), "--seed", str(self.table.seed_of(row))]]
        name = self.table.model_name
        lines = [] if row.is_original else [self._quantize_arguments(row, PRUNED if row.prune else None)]
        if row.prune is not None:
            lines = [self._prune_arguments(row, PRUNED if row.method else CHECKPOINT), *(lines if row.method else [])]
        if self.table.by_stock(row):
            scoring = ["--model", CHECKPOINT, "--baseline", name, "--context", str(self.table.evaluation.context)]
            return [*(["compress", *_shown(line)] for line in lines), ["python", "stock_score.py", *scoring]]
        beside = self._beside(name) if row.is_original else name
        lines.append(self._eval_arguments(name if row.is_original else CHECKPOINT, beside))
        return [["compress", *_shown(line)] for line in lines]

    def _evaluation(self, folder: Path, name: str) -> Evaluation:
        """Read what `compress eval` wrote; names that are paths become the row's, the model's and the text's."""
        found = Evaluation.read(folder / "compress_eval.json")
        text = {"text": self.table.evaluation.file}
        return replace(
            found,
            model=replace(found.model, name=name),
            baseline=None if found.baseline is None else replace(found.baseline, name=self.table.model_name),
            tasks={task: replace(result, settings={**result.settings, **text}) for task, result in found.tasks.items()},
        )

    def clean(self, row: Row) -> None:
        """Remove what a finished row has left in the work folder."""
        shutil.rmtree(self.work / self.table.key(row), ignore_errors=True)


def expert_tokens(report: dict[str, Any]) -> dict[str, float] | None:
    """Return what a report says about the calibration tokens of experts, or None if it says nothing."""
    units = [unit for unit in report.get("units", ()) if "expert_tokens_fewest" in unit]
    if not units:
        return None
    used = [row["tokens"] for row in report["rows"] if row.get("routed") is not None]
    return {
        "routed_fewest": min(unit["expert_tokens_fewest"] for unit in units),
        "used_fewest": min(used),
        "topped_up": sum(unit["experts_topped_up"] for unit in units),
    }


def _shown(words: list[str]) -> list[str]:
    return [word for word in words if word not in ("--force", "--no-cache", "--quiet")]


def _read(path: Path) -> dict[str, Any]:
    """Read JSON that a finished step must have left.

    Raises:
        CheckpointError: It has not, or it is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: the step ended well but left no readable result: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: the step left no JSON object")
    return data
