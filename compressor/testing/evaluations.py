"""Evaluations made of given scores, for tests of what reads them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate, Model, Samples, TaskResult


def model(name: str) -> Model:
    """Return a model whose fingerprint is the hash of its name."""
    return Model(name, None, hashlib.sha256(name.encode()).hexdigest(), "dense-float32", "float32")


def samples(
    values: Mapping[str, Sequence[float]], weight: int = 1, group: Sequence[str] | None = None, start: int = 0
) -> Samples:
    """Return samples with equal weights, numbered from `start`."""
    count = len(next(iter(values.values())))
    return Samples(
        id=tuple(range(start, start + count)),
        hash=tuple(hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(start, start + count)),
        weight=(weight,) * count,
        values={name: tuple(float(value) for value in column) for name, column in values.items()},
        group=None if group is None else tuple(group),
    )


def document_task(group: Sequence[str] | None = None, **scores: Sequence[float]) -> TaskResult:
    """Return a task with one score per document; keywords are its metrics."""
    made = samples(scores, group=group)
    return TaskResult("1", {"num_fewshot": 0, "limit": None}, {name: made.mean(name) for name in scores}, made)


def perplexity_task(nll: Sequence[float], segment: int = 128) -> TaskResult:
    """Return a perplexity of segments whose mean negative log-likelihoods per token are given."""
    made = samples({"nll": [segment * value for value in nll]}, weight=segment)
    mean = made.mean("nll")
    error = None if mean.standard_error is None else math.exp(mean.value) * mean.standard_error
    return TaskResult(
        "1", text_settings(made), {"perplexity": Estimate(math.exp(mean.value), error), "nll": mean}, made
    )


def kl_task(kl: Sequence[float], segment: int = 128) -> TaskResult:
    """Return a divergence of segments with these means per token; every second token agrees."""
    made = samples(
        {"kl": [segment * value for value in kl], "agreement": [segment / 2 for _ in kl]},
        weight=segment,
    )
    metrics = {"kl": made.mean("kl"), "kl_p99": Estimate(max(kl), None), "agreement": made.mean("agreement")}
    return TaskResult("1", text_settings(made), metrics, made)


def text_settings(made: Samples) -> dict[str, Any]:
    """Return the settings of a text task with these samples."""
    return {"text": "text.txt", "text_sha256": "0" * 64, "context": 1024, "n_tokens": sum(made.weight), "segment": 128}


def evaluation(name: str, tasks: Mapping[str, TaskResult], baseline: str | None = None, seed: int = 0) -> Evaluation:
    """Return an evaluation of a model of that name, measured against `baseline` if given."""
    against = None if baseline is None else model(baseline)
    return Evaluation(model(name), against, {"compressor": "0"}, seed, dict(tasks), {"seconds": 1.0})
