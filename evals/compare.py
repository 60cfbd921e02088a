"""Comparing a compressed model with the original, token by token on the same text.

Both models see the same windows, so differences are paired: the error of the mean difference is far smaller than that
of either mean. Windows, segments and standard errors are those of `evals.perplexity`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import compressor
from compressor.checkpoint.skeleton import quiet
from compressor.errors import CheckpointError, RecipeError
from compressor.evals.perplexity import (
    ROWS,
    SEGMENT,
    Estimate,
    check_tokens,
    clustered_mean,
    exponential,
    token_nll,
    window_logits,
    windows,
)
from compressor.runtime import execution_path, load

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """One of the two models: what it is called, what computed it, and how well it predicts."""

    name: str
    execution_path: str
    dtype: str
    perplexity: Estimate


@dataclass(frozen=True)
class Comparison:
    """What compression changed.

    Attributes:
        baseline: The original.
        candidate: The compressed model.
        nll_difference: Candidate minus baseline, nats per token, paired; below zero the candidate predicts better.
        kl: Mean KL(baseline || candidate) of the next-token distributions, nats.
        kl_p99: Its 99th percentile over tokens (nearest rank).
        agreement: Share of positions where both models rank the same token first.
        n_tokens: Predicted tokens.
        context: Tokens per window.
        text_sha256: SHA-256 of the token ids as little-endian int64.
        seconds: Wall time, loading excluded.
    """

    baseline: Side
    candidate: Side
    nll_difference: Estimate
    kl: Estimate
    kl_p99: float
    agreement: Estimate
    n_tokens: int
    context: int
    text_sha256: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data; two runs of the same comparison on one machine differ under `timing` alone."""

        def side(model: Side) -> dict[str, Any]:
            return {
                "name": model.name,
                "execution_path": model.execution_path,
                "dtype": model.dtype,
                "perplexity": model.perplexity.to_json(),
            }

        return {
            "baseline": side(self.baseline),
            "candidate": side(self.candidate),
            "nll_difference": self.nll_difference.to_json(),
            "kl": self.kl.to_json(),
            "kl_p99": self.kl_p99,
            "agreement": self.agreement.to_json(),
            "n_tokens": self.n_tokens,
            "context": self.context,
            "segment": SEGMENT,
            "text_sha256": self.text_sha256,
            "versions": {
                "compressor": compressor.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "timing": {"seconds": self.seconds},
        }


def compare(
    candidate: PreTrainedModel,
    baseline: PreTrainedModel,
    tokens: Tensor,
    context: int,
    *,
    names: tuple[str, str] = ("candidate", "baseline"),
    progress: Progress | None = None,
) -> Comparison:
    """Compare two causal language models on one text.

    Memory beyond the models: the logits of one window of each, `context x vocabulary`, plus a few hundred rows.

    Args:
        candidate: The compressed model.
        baseline: The original.
        tokens: int64 `[n]`.
        context: Tokens per window.
        names: What reports call candidate and baseline.
        progress: Called with windows done and windows in all.

    Raises:
        RecipeError: Vocabularies differ, too few tokens, or a context a model cannot take.
        VerificationError: Logits that are not finite.
    """
    for model in (candidate, baseline):
        check_tokens(tokens, context, model)
    started = time.perf_counter()
    parts: list[tuple[Tensor, ...]] = []
    cut = list(windows(tokens, context))
    for index, window in enumerate(cut):
        ours = window_logits(candidate, window, names[0], index)
        theirs = window_logits(baseline, window, names[1], index)
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
    sides = [
        Side(
            name,
            execution_path(model, context),
            str(model.dtype).removeprefix("torch."),
            exponential(clustered_mean(nll)),
        )
        for name, model, nll in zip(names, (candidate, baseline), (nll_ours, nll_theirs), strict=True)
    ]
    return Comparison(
        baseline=sides[1],
        candidate=sides[0],
        nll_difference=clustered_mean(nll_ours - nll_theirs),
        kl=clustered_mean(kl),
        kl_p99=percentile(kl, 0.99),
        agreement=clustered_mean(agrees),
        n_tokens=len(kl),
        context=context,
        text_sha256=hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        seconds=time.perf_counter() - started,
    )


def evaluate(
    candidate: str | Path,
    baseline: str | Path,
    tokens: Tensor,
    context: int,
    *,
    names: tuple[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Load two checkpoints and compare them; both are in memory together, the compressed one packed.

    Args:
        candidate: Folder of the compressed model.
        baseline: Folder of the original.
        tokens: int64 `[n]`, from the baseline's tokenizer.
        context: Tokens per window.
        names: What reports call candidate and baseline; their paths by default.
        dtype: Dtype both models compute in.
        device: Where both models go.
        trust_remote_code: Run model code that comes with the checkpoints, where transformers has none of its own.
        progress: Called with windows done and windows in all.

    Raises:
        RecipeError: As `compare`; also if the tokenizers differ.
        CheckpointError: A checkpoint cannot be read.
        VerificationError: Logits that are not finite.
    """
    check_tokenizers(Path(candidate), Path(baseline), tokens)
    trust = trust_remote_code
    ours, theirs = (load(path, dtype=dtype, device=device, trust_remote_code=trust) for path in (candidate, baseline))
    return compare(ours, theirs, tokens, context, names=names or (str(candidate), str(baseline)), progress=progress)


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
