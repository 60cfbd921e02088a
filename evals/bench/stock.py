"""Scores made by `external/stock_score.py`, turned into an evaluation that pairs with ours.

The scores come as sums over the segments of our own evaluation of the original. That program scored the original too:
if its scores of the original are not ours, its scores of anything else are not comparable, and the row fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressor.errors import VerificationError
from compressor.evals.perplexity import exponential
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate, Model, Samples, TaskResult

TOLERANCE = 1e-3
"""Largest difference of the original's perplexity between this package and stock transformers, relative."""

PATHS = {False: "stock transformers, weights dequantized", True: "stock transformers, inputs rounded"}
"""Whether inputs are rounded -> how the model was run."""


def evaluation_from_scores(scores: Mapping[str, Any], original: Evaluation, name: str, seconds: float) -> Evaluation:
    """Convert.

    Args:
        scores: What the program wrote.
        original: Our evaluation of the original on the same tokens.
        name: Name of the row.
        seconds: Time of the scoring.

    Raises:
        VerificationError: Other segments, or another perplexity of the original, than in our evaluation.
    """
    base = original.tasks["perplexity"]
    check_original(scores, base, name)
    columns = {key: tuple(float(v) for v in scores[key]) for key in ("nll", "kl", "agreement")}
    losses = replace(base.samples, values={"nll": columns["nll"]})
    nll = losses.mean("nll")
    perplexity = replace(base, metrics={"perplexity": exponential(nll), "nll": nll}, samples=losses)
    divergences = replace(base.samples, values={key: columns[key] for key in ("kl", "agreement")})
    metrics = {
        "kl": divergences.mean("kl"),
        "kl_p99": Estimate(float(scores["kl_p99"]), None),
        "agreement": divergences.mean("agreement"),
    }
    kl = replace(base, metrics=metrics, samples=divergences)
    return Evaluation(
        model=Model(name, None, str(scores["fingerprint"]), PATHS[bool(scores.get("rounds_inputs"))], "float32"),
        baseline=original.model,
        versions=dict(scores["versions"]),
        seed=original.seed,
        tasks={"perplexity": perplexity, "kl": kl},
        timing={"seconds": seconds},
    )


def check_original(scores: Mapping[str, Any], base: TaskResult, name: str) -> None:
    """Raise unless the scores are of the same segments and agree with us about the original.

    Raises:
        VerificationError: With the numbers.
    """
    ours: Samples = base.samples
    same_text = scores["text_sha256"] == base.settings["text_sha256"]
    if not same_text or tuple(scores["weight"]) != ours.weight:
        raise VerificationError(
            f"{name}: scored {len(scores['weight'])} segments of {sum(scores['weight'])} predictions, our evaluation "
            f"of the original has {len(ours)} of {sum(ours.weight)}" + ("" if same_text else ", of other tokens"),
            "score the same tokens with the same context",
        )
    total = sum(ours.weight)
    theirs, wanted = (math.exp(sum(column) / total) for column in (scores["baseline_nll"], ours.values["nll"]))
    if not abs(theirs / wanted - 1) <= TOLERANCE:
        raise VerificationError(
            f"{name}: stock transformers gives the original a perplexity of {theirs:.5f}, this package {wanted:.5f}",
            "the two do not compute the same model: compare their versions",
        )
