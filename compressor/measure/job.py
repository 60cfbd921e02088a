"""Running the tasks of one evaluation on one or two models, with the original's results cached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from compressor import __version__
from compressor.evals.baseline import Entry, recall, remember
from compressor.evals.compare import compare
from compressor.evals.embeddings import Sentences, compare_embeddings, embed
from compressor.evals.perplexity import VERSION as TEXT_VERSION
from compressor.evals.perplexity import Text, perplexity
from compressor.evals.results import Evaluation
from compressor.evals.scores import TaskResult
from compressor.evals.tasks import AGAINST_BASELINE, EMBEDDINGS
from compressor.measure.subject import DTYPE, Subject
from compressor.report import Progress

if TYPE_CHECKING:
    from compressor.evals.harness import Harness


@dataclass(frozen=True)
class Job:
    """What to run on what.

    Attributes:
        candidate: The model.
        original: What it was made from, or None.
        names: Tasks: `perplexity`, `kl`, and names of the harness.
        text: What perplexity and KL are measured on, or the sentences to embed; None if none of these is asked for.
        harness: The lm-eval tasks; None if there are none.
        seed: Of few-shot choices.
        batch_size: Requests per forward pass of lm-eval tasks.
        cache: Whether to use the cache of originals' results.
        progress: Who is told how far it is.
    """

    candidate: Subject
    original: Subject | None
    names: tuple[str, ...]
    text: Text | Sentences | None
    harness: Harness | None
    seed: int
    batch_size: int
    cache: bool
    progress: Progress

    def run(self) -> tuple[Evaluation, Evaluation | None]:
        """Return the evaluation of the model, and that of the original if there is one.

        KL needs both models in memory at once. Without it the original goes first and is released, and is not even
        loaded if the cache has all its results.
        """
        started = time.perf_counter()
        ours: dict[str, TaskResult] = {}
        theirs: dict[str, TaskResult] = {}
        cached: list[str] = []
        if self.original:
            if EMBEDDINGS in self.names:
                ours[EMBEDDINGS] = self._embeddings(self.original)
            elif set(self.names) & set(AGAINST_BASELINE):
                self._run_both(self.original, ours, theirs)
            for name in self.names:
                if name not in AGAINST_BASELINE and name not in theirs:
                    theirs[name], known = self._of_original(self.original, name)
                    cached += [name] if known else []
            self.original.release()
        for name in self.names:
            if name not in ours:
                ours[name] = self._compute(self.candidate, name)
        versions = self._versions(any(name not in ("perplexity", *AGAINST_BASELINE) for name in self.names))
        seconds = time.perf_counter() - started
        header = self.original.header() if self.original else None
        chosen = {name: ours[name] for name in self.names}
        cut = self.candidate.saturation.result()
        saturation = None if cut is None else cut.to_json()
        model = Evaluation(
            self.candidate.header(), header, versions, self.seed, chosen, {"seconds": seconds}, saturation
        )
        if header is None:
            return model, None
        # Perplexity that only came along with KL was not asked for; the cache has it.
        chosen = {name: theirs[name] for name in self.names if name not in AGAINST_BASELINE}
        timing = {"seconds": seconds, "cached": cached}
        return model, Evaluation(header, None, versions, self.seed, chosen, timing)

    def _run_both(self, original: Subject, ours: dict[str, TaskResult], theirs: dict[str, TaskResult]) -> None:
        """Run perplexity, KL and what routers do in one pass of both models over the text."""
        assert isinstance(self.text, Text)
        self.progress.stage("loading both models")
        models = self.candidate.model, original.model
        names = self.candidate.name, original.name
        result = compare(*models, self.text, names=names, progress=_windows(self.progress, "both models"))
        ours |= {"perplexity": result.candidate, "kl": result.kl}
        if result.routers:
            ours["routers"] = result.routers
        theirs["perplexity"] = result.baseline
        self._remember(original, "perplexity", result.baseline)

    def _embeddings(self, original: Subject) -> TaskResult:
        """Embed the sentences with both models, one after the other."""
        assert isinstance(self.text, Sentences)
        found = []
        for subject in (original, self.candidate):
            self.progress.stage(f"{subject.name}: embedding sentences")
            found.append(embed(subject.model, subject.tokenizer, self.text, subject.name))
            subject.release()
        return compare_embeddings(found[1], found[0], self.text)

    def _of_original(self, original: Subject, name: str) -> tuple[TaskResult, bool]:
        """Return one task's result of the original, and whether it came from the cache."""
        if self.cache and (entry := recall(self._key(original, name), self.progress)):
            original.execution_path = entry.execution_path
            return entry.result, True
        result = self._compute(original, name)
        self._remember(original, name, result)
        return result, False

    def _remember(self, original: Subject, name: str, result: TaskResult) -> None:
        if self.cache:
            path = original.header().execution_path
            remember(self._key(original, name), Entry(result, path), self.progress)

    def _compute(self, subject: Subject, name: str) -> TaskResult:
        """Run one task, other than KL, on one model."""
        self.progress.stage(f"{subject.name}: {name}")
        if name == "perplexity":
            assert isinstance(self.text, Text)
            return perplexity(subject.model, self.text, subject.name, _windows(self.progress, subject.name))
        assert self.harness is not None
        return self.harness.run(
            name, subject.model, subject.tokenizer, batch_size=self.batch_size, progress=self.progress
        )

    def _key(self, subject: Subject, name: str) -> dict[str, Any]:
        """Return everything that one task's result depends on."""
        if name == "perplexity":
            assert self.text is not None
            version, settings = TEXT_VERSION, self.text.settings()
        else:
            assert self.harness is not None
            task = self.harness.tasks[name]
            version, settings = task.version, {**task.settings, "batch_size": self.batch_size}
        return {
            "model": subject.fingerprint,
            "commit": subject.commit,
            "task": name,
            "version": version,
            "settings": settings,
            "seed": self.seed,
            "dtype": str(DTYPE),
            "device": subject.device.type,
            "rows": subject.rows,
            "versions": self._versions(name != "perplexity"),
        }

    def _versions(self, with_harness: bool) -> dict[str, str]:
        versions = {
            "compressor": __version__,
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        }
        if with_harness:
            from compressor.evals.harness import VERSION

            versions["lm_eval"] = VERSION
        return versions


def _windows(progress: Progress, who: str) -> Callable[[int, int], None]:
    def done(windows: int, total: int) -> None:
        progress.stage(f"{who}: window {windows} of {total}")

    return done
