"""Measuring a model, alone or against the original it was made from, by folder or name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.calibration.dataset import load_text, tokenize
from compressor.checkpoint.source import read_json
from compressor.environment import pick_device
from compressor.errors import RecipeError, disk_error
from compressor.evals.compare import check_tokenizers
from compressor.evals.embeddings import Sentences, find_sentences
from compressor.evals.perplexity import Text
from compressor.evals.results import Evaluation
from compressor.evals.tasks import EMBEDDINGS, SENTENCES, Kind, TaskSpec, choose
from compressor.measure.job import Job
from compressor.measure.subject import Subject
from compressor.output import RECIPE
from compressor.report import Progress, Silent

if TYPE_CHECKING:
    from compressor.evals.harness import Harness

EVALUATION = "compress_eval.json"
BASELINE_EVALUATION = "compress_eval_baseline.json"


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    Attributes:
        model: The model's evaluation, as in `compress_eval.json`.
        baseline: The original's, as in `compress_eval_baseline.json`; None if there was nothing to compare with.
        written: The files that hold them; none if there was no folder to write to.
    """

    model: Evaluation
    baseline: Evaluation | None
    written: tuple[Path, ...] = ()


def evaluate(
    model: str | Path,
    baseline: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    suite: str | None = None,
    text: str = "python-docs",
    max_tokens: int = 8192,
    context: int = 1024,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    cache: bool = True,
    output: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluated:
    """Measure a model and, where there is one, the original it was made from; the same as `compress eval`.

    Args:
        model: A checkpoint folder, or anything else `compress quantize` takes.
        baseline: The original; None takes it from the recipe saved in `model`, and without one measures `model` alone.
        tasks: `perplexity`, `kl`, `routers`, `embeddings`, `minimal-pairs`, names of lm-eval tasks, or paths of task
            YAML; None is perplexity, with a baseline KL, for mixtures of experts routers, and for models without a head
            `embeddings` alone.
        suite: Name or path of a suite of tasks, in addition to `tasks`.
        text: For perplexity, KL and sentences: a preset (its held-out part), .txt or .jsonl file.
        max_tokens: Tokens of the text to score, from its start.
        context: Tokens per window, or of a sentence.
        num_fewshot: Examples in the prompts of lm-eval tasks; None leaves it to the tasks.
        limit: Documents per lm-eval task (per phenomenon for minimal pairs), the first ones; None for all. Of sentences
            None means 512.
        seed: Of few-shot choices.
        batch_size: Requests per forward pass of lm-eval tasks.
        cache: Take the original's results from the cache, and keep them there.
        output: Folder for the JSON files; None means `model`, if that is a folder.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: Run model code that comes with the checkpoints, where transformers has none of its own.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing is written then.
    """
    progress = progress or Silent()
    where = pick_device(device)
    if batch_size < 1 or max_tokens < 2:
        raise RecipeError(f"batch size {batch_size}, {max_tokens} tokens", "give at least 1 and 2")
    candidate = Subject(str(model), where, context, trust_remote_code)
    baseline = baseline or original_of(candidate.folder)
    original = Subject(baseline, where, context, trust_remote_code) if baseline else None
    specs = choose(
        *(tasks, suite),
        has_baseline=original is not None,
        has_experts=candidate.has_experts,
        headless=candidate.headless,
        num_fewshot=num_fewshot,
        limit=limit,
    )
    # A model known by name lies in a cache, which is no place for results.
    target = Path(output) if output is not None else candidate.folder if candidate.folder == Path(model) else None
    with ExitStack() as stack:
        scored = _scored(text, max_tokens, context, candidate, original, specs)
        harness, names = _harness(specs, seed, progress)
        if harness:
            stack.enter_context(harness)
        job = Job(candidate, original, names, scored, harness, seed, batch_size, cache, progress)
        found, reference = job.run()
    return Evaluated(found, reference, _write(target, found, reference) if target else ())


def original_of(folder: Path) -> str | None:
    """Return the model a result was made from, as its saved recipe says; None for what is no result of ours."""
    recipe = folder / RECIPE
    if not recipe.is_file():
        return None
    saved = read_json(recipe)
    model, revision = str(saved.get("model")), saved.get("source_revision")
    return f"{model.partition('@')[0]}@{revision}" if revision else model


def _scored(
    name: str, max_tokens: int, context: int, candidate: Subject, original: Subject | None, specs: Sequence[TaskSpec]
) -> Text | Sentences | None:
    """Return the text or the sentences to score, if a task needs them, in tokens that mean the same to both models."""
    if not any(spec.kind is Kind.TEXT for spec in specs):
        return None
    model, text = original or candidate, load_text(name)
    tokens = tokenize(text, model.tokenizer, model.vocab_size, limit=max_tokens)
    if original:
        check_tokenizers(candidate.folder, original.folder, tokens)
    shown = Path(name).name if Path(name).is_file() else name
    if specs[0].name == EMBEDDINGS:
        return Sentences(shown, find_sentences(text, specs[0].limit or SENTENCES), min(context, model.positions))
    return Text(shown, tokens, context)


def _harness(specs: Sequence[TaskSpec], seed: int, progress: Progress) -> tuple[Harness | None, tuple[str, ...]]:
    """Load the tasks of lm-eval, and return all tasks' names in order; a task in a file says its name itself."""
    others = [spec for spec in specs if spec.kind is not Kind.TEXT]
    if not others:
        return None, tuple(spec.name for spec in specs)
    # Imported here: it takes seconds, and perplexity does not need it.
    from compressor.evals.harness import Harness

    progress.stage(f"loading {len(others)} task{'s' if len(others) > 1 else ''}")
    harness = Harness(others, seed=seed, progress=progress)
    loaded = iter(harness.tasks)
    return harness, tuple(spec.name if spec.kind is Kind.TEXT else next(loaded) for spec in specs)


def _write(target: Path, model: Evaluation, baseline: Evaluation | None) -> tuple[Path, ...]:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, target) from error
    files = {target / EVALUATION: model}
    if baseline:
        files[target / BASELINE_EVALUATION] = baseline
    for path, evaluation in files.items():
        evaluation.write(path)
    if not baseline:  # one of an earlier run would be taken for this one's
        (target / BASELINE_EVALUATION).unlink(missing_ok=True)
    return tuple(files)
