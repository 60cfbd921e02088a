"""Comparing a compressed model with the original, token by token on the same text, and paired differences of scores.

Both models see the same windows, so differences are paired: the error of the mean difference is far smaller than that
of either mean. Windows, segments and standard errors are those of `evals.perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.checkpoint.config import quiet
from compressor.errors import CheckpointError, RecipeError
from compressor.evals.paired import paired_difference
from compressor.evals.perplexity import (
    ROWS,
    VERSION,
    Text,
    check_tokens,
    perplexity_result,
    token_nll,
    window_logits,
    windows,
)
from compressor.evals.routing import RouterWatch
from compressor.evals.scores import Estimate, TaskResult

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What one pass of both models over a text gives.

    Attributes:
        candidate: The compressed model's perplexity.
        baseline: The original's.
        kl: KL(baseline || candidate) of the next-token distributions in nats (mean, and its 99th percentile over tokens
            by nearest rank), and the share of positions where both models rank the same token first.
        routers: What became of the choices of experts; None for models without.
    """

    candidate: TaskResult
    baseline: TaskResult
    kl: TaskResult
    routers: TaskResult | None = None


def compare(
    candidate: PreTrainedModel,
    baseline: PreTrainedModel,
    text: Text,
    *,
    names: tuple[str, str] = ("candidate", "baseline"),
    progress: Progress | None = None,
) -> Comparison:
    """Compare two causal language models on one text.

    Memory beyond the models: the logits of one window of each, `context x vocabulary`, plus a few hundred rows.

    Args:
        candidate: The compressed model.
        baseline: The original.
        text: What both predict.
        names: What errors call candidate and baseline.
        progress: Called with windows done and windows in all.

    Raises:
        RecipeError: Vocabularies differ, too few tokens, or a context a model cannot take.
        VerificationError: Logits that are not finite.
    """
    for model in (candidate, baseline):
        check_tokens(text.tokens, text.context, model)
    parts: list[tuple[Tensor, ...]] = []
    cut = list(windows(text.tokens, text.context))
    watch = RouterWatch(candidate, baseline)
    for index, window in enumerate(cut):
        with watch.attached():
            ours = window_logits(candidate, window, names[0], index)
            theirs = window_logits(baseline, window, names[1], index)
        if watch:
            watch.window()
        if ours.shape != theirs.shape:
            raise RecipeError(
                f"{names[0]} predicts {ours.shape[-1]} tokens, {names[1]} {theirs.shape[-1]}",
                "compare a compressed model with the model it was made from",
            )
        kl, agrees = _divergence(theirs, ours.to(theirs.device))
        parts.append((token_nll(ours, window[1:]), token_nll(theirs, window[1:]), kl, agrees))
        if progress:
            progress(index + 1, len(cut))
    nll_ours, nll_theirs, kl, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    return Comparison(
        candidate=perplexity_result(nll_ours, text),
        baseline=perplexity_result(nll_theirs, text),
        kl=_kl_result(kl, agrees, text),
        routers=watch.result(text) if watch else None,
    )


def difference(candidate: TaskResult, baseline: TaskResult, metric: str) -> Estimate | None:
    """Return candidate minus baseline with its own standard error, paired by sample.

    A perplexity's difference is relative, `exp` of the difference in nats minus one (delta method): compression
    multiplies it. None for metrics whose samples are not kept, such as percentiles.

    Raises:
        RecipeError: The two results are not about the same documents.
    """
    if metric in candidate.samples.values:
        return paired_difference(baseline.samples, candidate.samples, metric)
    if is_perplexity(candidate, metric):
        nats = paired_difference(baseline.samples, candidate.samples, "nll")
        ratio = math.exp(nats.value)
        return Estimate(ratio - 1, None if nats.standard_error is None else ratio * nats.standard_error)
    return None


def is_perplexity(result: TaskResult, metric: str) -> bool:
    """Return whether a metric is `exp` of the mean of the samples' `nll`."""
    return metric in ("perplexity", "byte_perplexity") and "nll" in result.samples.values


def check_tokenizers(candidate: Path, baseline: Path, tokens: Tensor) -> None:
    """Raise unless both folders' tokenizers have one vocabulary and cut this text alike.

    Folders that both have no tokenizer pass: then only the models' vocabulary sizes can be compared.

    Raises:
        RecipeError: They differ, or only one folder has one.
        CheckpointError: A tokenizer cannot be read.
    """
    ours, theirs = _tokenizer(candidate), _tokenizer(baseline)
    if ours is None and theirs is None:
        return
    hint = "compare a compressed model with the model it was made from"
    if ours is None or theirs is None:
        raise RecipeError(f"{candidate if ours is None else baseline} has no tokenizer, the other model has one", hint)
    if ours.get_vocab() != theirs.get_vocab():
        raise RecipeError(
            f"the tokenizers of {candidate} ({len(ours)} tokens) and {baseline} ({len(theirs)}) differ", hint
        )
    text = theirs.decode(tokens[:4096].tolist())
    if ours.encode(text) != theirs.encode(text):
        raise RecipeError(f"the tokenizers of {candidate} and {baseline} cut the text differently", hint)


def percentile(values: Tensor, share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed (nearest rank)."""
    rank = max(1, math.ceil(share * len(values)))
    return float(values.kthvalue(rank).values)


def _kl_result(kl: Tensor, agrees: Tensor, text: Text) -> TaskResult:
    """Turn per-token divergences and agreements `[n_predictions]` into the task's result."""
    samples = text.samples({"kl": kl, "agreement": agrees})
    metrics = {
        "kl": samples.mean("kl"),
        "kl_p99": Estimate(percentile(kl, 0.99), None),
        "agreement": samples.mean("agreement"),
    }
    return TaskResult(VERSION, text.settings(), metrics, samples)


def _divergence(baseline: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(baseline || candidate) and 1.0 where the top tokens agree, float64 `[n]` each, on the CPU.

    Log-probabilities are float32. Rounding can make a KL near zero negative, which it cannot be: it is cut at zero.
    """
    divergences, agreements = [], []
    for theirs, ours in zip(baseline.split(ROWS), candidate.split(ROWS), strict=True):
        p, q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0).cpu())
        agreements.append((theirs.argmax(-1) == ours.argmax(-1)).double().cpu())
    return torch.cat(divergences), torch.cat(agreements)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer file provokes inside its library
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}", "copy it again") from error
    return tokenizer
