"""The steps behind a checkpoint: eval, gate and push."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compressor.errors import RecipeError
from compressor.files import sha256_file
from compressor.report import Progress
from compressor.ship.step import Done, Head, State


class Evaluate:
    """`compress eval` against the recipe's model."""

    name: ClassVar[str] = "eval"
    writes: ClassVar[bool] = False

    class Settings(BaseModel):
        """Flags of `compress eval`."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        tasks: tuple[str, ...] | None = Field(None, description="see: compress eval --list")
        suite: str | None = Field(None, description="suite of tasks: its name, or a YAML file")
        text: str = Field("python-docs", description="preset, .txt or .jsonl file")
        max_tokens: int = Field(8192, ge=2, description="tokens of the text to score")
        context: int = Field(1024, ge=2, description="tokens per window")
        num_fewshot: int | None = Field(None, ge=0, description="examples in lm-eval prompts")
        limit: int | None = Field(None, ge=1, description="documents per lm-eval task")
        batch_size: int = Field(8, ge=1, description="requests per forward pass of lm-eval tasks")
        cache: bool = Field(True, description="keep and reuse the original's results")
        baseline: str | None = Field(None, description="the original; None: the recipe's model")

    def __init__(self, settings: Settings) -> None:
        self.chosen = settings

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Evaluate:
        """Check settings; see `Step`."""
        return cls(cls.Settings.model_validate(settings))

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return self.chosen.model_dump(mode="json")

    def preflight(self, state: State) -> None:
        """Refuse unknown suites and broken files."""
        from compressor.evals.tasks import choose

        choose(
            self.chosen.tasks,
            self.chosen.suite,
            has_baseline=True,
            num_fewshot=self.chosen.num_fewshot,
            limit=self.chosen.limit,
        )

    def run(self, state: State, progress: Progress) -> Done:
        """Measure, or find that these measurements are there."""
        from compressor.evals.results import Evaluation
        from compressor.measure import BASELINE_EVALUATION, EVALUATION, Evaluated, evaluate

        folder = state.result
        baseline = self.chosen.baseline or state.head.model
        files = [folder / EVALUATION, folder / BASELINE_EVALUATION]
        key = self._key(state, baseline)
        known = state.records.get(self.name) or {}
        if not state.force and known.get("key") == key and known.get("files") == hashes(files):
            result = Evaluated(Evaluation.read(files[0]), Evaluation.read(files[1]), tuple(files))
            return Done(_scores(result), known, kept=True, shown=result)
        settings = self.chosen.model_dump(exclude={"baseline"})
        result = evaluate(
            folder,
            baseline,
            **settings,
            seed=state.head.seed,
            output=folder,
            device=state.device,
            trust_remote_code=state.head.trust_remote_code,
            progress=progress,
        )
        return Done(_scores(result), {"key": key, "files": hashes(files)}, shown=result)

    def _key(self, state: State, baseline: str) -> str:
        """Return a hash of everything the scores depend on: the models' and the texts' content too."""
        from compressor.checkpoint.resolve import resolve_model
        from compressor.environment import pick_device, versions
        from compressor.measure.subject import fingerprint

        original, _ = resolve_model(baseline, state.head.trust_remote_code)
        named = [self.chosen.text, self.chosen.suite or "", *(self.chosen.tasks or ())]
        paths = [Path(name.partition(":")[2] or name) for name in named]
        parts = {
            "settings": self.settings(),
            "seed": state.head.seed,
            "device": pick_device(state.device).type,
            "models": [fingerprint(state.result), fingerprint(original)],
            "files": {str(path): sha256_file(path) for path in paths if path.is_file()},
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Gate:
    """`compress gate` on what the eval step measured; a verdict is always made anew, it takes a second."""

    name: ClassVar[str] = "gate"
    writes: ClassVar[bool] = False

    class Settings(BaseModel):
        """Flags of `compress gate`."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        rules: tuple[str, ...] = Field((), description="such as 'ppl <= +2%'")
        rules_file: str | None = Field(None, description="text file with one rule per line")
        confidence: float = Field(0.95, gt=0.5, lt=1, description="of each one-sided bound")
        strict: bool = Field(False, description="inconclusive rules fail the gate")
        by_group: bool = Field(False, description="independent units are groups, not documents")

    def __init__(self, settings: Settings) -> None:
        self.chosen = settings

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Gate:
        """Check settings and the grammar of every rule."""
        from compressor.evals.rules import parse_rule

        chosen = cls.Settings.model_validate(settings)
        for rule in chosen.rules:
            parse_rule(rule)
        if not chosen.rules and chosen.rules_file is None:
            raise RecipeError("there are no rules to judge by", "for example rules: ['ppl <= +2%']")
        return cls(chosen)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return self.chosen.model_dump(mode="json")

    def preflight(self, state: State) -> None:
        """Read the rules file."""
        self._rules()

    def _rules(self) -> list[Any]:
        from compressor.evals.rules import parse_rule, read_rules

        more = read_rules(Path(self.chosen.rules_file)) if self.chosen.rules_file else []
        return [*(parse_rule(rule) for rule in self.chosen.rules), *more]

    def run(self, state: State, progress: Progress) -> Done:
        """Judge, and leave the verdict beside the checkpoint."""
        from compressor.evals.gate import gate
        from compressor.evals.gate_report import headline
        from compressor.evals.results import Evaluation
        from compressor.evals.verdict import write_verdict
        from compressor.measure import BASELINE_EVALUATION, EVALUATION

        result = gate(
            Evaluation.read(state.result / BASELINE_EVALUATION),
            Evaluation.read(state.result / EVALUATION),
            self._rules(),
            confidence=self.chosen.confidence,
            strict=self.chosen.strict,
            by_group=self.chosen.by_group,
        )
        write_verdict(state.result, result)
        return Done(headline(result), {"passed": result.passed}, passed=result.passed, shown=result)


class Push:
    """`compress push` of the result; what is there already is not sent again."""

    name: ClassVar[str] = "push"
    writes: ClassVar[bool] = False

    class Settings(BaseModel):
        """Flags of `compress push`."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        repo: str = Field(min_length=1, description="owner/name on the Hub")
        private: bool = Field(False, description="only its owner may see it")

    def __init__(self, settings: Settings) -> None:
        self.chosen = settings

    @classmethod
    def build(cls, settings: Mapping[str, Any], head: Head) -> Push:
        """Check settings; see `Step`."""
        return cls(cls.Settings.model_validate(settings))

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return self.chosen.model_dump(mode="json")

    def preflight(self, state: State) -> None:
        """Refuse what would be noticed only after the last step: a bad id, or no token."""
        from compressor.ship.push import check_target

        check_target(self.chosen.repo)

    def run(self, state: State, progress: Progress) -> Done:
        """Upload."""
        from dataclasses import asdict

        from compressor.ship.push import push

        done = push(state.result, self.chosen.repo, private=self.chosen.private, force=state.force, progress=progress)
        what = f"{done.changed} of {done.files} files uploaded" if done.changed else "everything is there already"
        return Done(f"{done.repo}: {what}, commit {done.commit}", asdict(done), kept=not done.changed)


def hashes(files: list[Path]) -> dict[str, str | None]:
    """Return name -> SHA-256; None for files that are not there."""
    return {path.name: sha256_file(path) if path.is_file() else None for path in files}


def _scores(result: Any) -> str:
    """Return the main scores in one line."""
    shown = []
    for name, task in result.model.tasks.items():
        metric = next(iter(task.metrics))
        estimate = task.metrics[metric]
        error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2g}"
        shown.append(f"{name if name == metric else f'{name} {metric}'} {estimate.value:.4g}{error}")
    return ", ".join(shown)
