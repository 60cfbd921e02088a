"""Perplexity over fixed windows of a text, and standard errors that know neighbouring tokens are correlated.

Windows do not overlap: every window of `context` tokens starts without memory of the one before, and its first token is
not predicted. A last, shorter window counts if it holds at least two tokens.

Standard errors are clustered: the error of token after token inside one text is correlated, so treating tokens as
independent would make every error bar too short. Predictions are cut into segments of 128 consecutive ones (a paragraph
or so, beyond which correlation is weak); only differences between segments count as noise. The formula is that of
`results.weighted_mean`. Segments are the samples of the evaluation file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import RecipeError, VerificationError
from compressor.evals.scores import Estimate, Samples, TaskResult

VERSION = "1"
"""Of the definition of perplexity and KL; raise it when a change to windows, segments or formulas changes scores."""

SEGMENT = 128
"""Predictions per segment."""

ROWS = 128
"""Rows of logits that are turned into probabilities at once; bounds memory at vocabularies of any size."""


@dataclass(frozen=True)
class Text:
    """What is scored.

    Attributes:
        name: Preset or file name, for reports.
        tokens: int64 `[n]`.
        context: Tokens per window.
    """

    name: str
    tokens: Tensor
    context: int

    @property
    def n_predictions(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in windows(self.tokens, self.context))

    def settings(self) -> dict[str, Any]:
        """Return what scores on this text depend on; equal settings mean equal tokens in equal windows."""
        return {
            "text": self.name,
            "text_sha256": hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest(),
            "context": self.context,
            "n_tokens": self.n_predictions,
            "segment": SEGMENT,
        }

    def samples(self, values: Mapping[str, Tensor]) -> Samples:
        """Sum per-token values over segments.

        Args:
            values: Metric name -> `[n_predictions]`.
        """
        targets = torch.cat([window[1:] for window in windows(self.tokens, self.context)])
        segments = targets.split(SEGMENT)
        return Samples(
            id=tuple(range(len(segments))),
            # The context belongs to the hash: the same token after another history is another prediction.
            hash=tuple(_segment_hash(segment, self.context) for segment in segments),
            weight=tuple(len(segment) for segment in segments),
            values={name: segment_sums(column) for name, column in values.items()},
        )


def perplexity(
    model: PreTrainedModel, text: Text, who: str = "the model", progress: Callable[[int, int], None] | None = None
) -> TaskResult:
    """Measure how well a model predicts a text.

    Args:
        model: A causal language model.
        text: What to predict.
        who: What errors call the model.
        progress: Called with windows done and windows in all.

    Raises:
        RecipeError: Too few tokens, or a context the model cannot take.
        VerificationError: Logits that are not finite.
    """
    check_tokens(text.tokens, text.context, model)
    parts = []
    cut = list(windows(text.tokens, text.context))
    for index, window in enumerate(cut):
        parts.append(token_nll(window_logits(model, window, who, index), window[1:]))
        if progress:
            progress(index + 1, len(cut))
    return perplexity_result(torch.cat(parts), text)


def perplexity_result(nll: Tensor, text: Text) -> TaskResult:
    """Turn negative log-likelihoods `[n_predictions]` into the task's result."""
    samples = text.samples({"nll": nll})
    mean = samples.mean("nll")
    metrics = {"perplexity": exponential(mean), "nll": mean}
    return TaskResult(VERSION, text.settings(), metrics, samples)


def check_tokens(tokens: Tensor, context: int, model: PreTrainedModel) -> None:
    """Raise unless the tokens and the window length fit the model.

    Raises:
        RecipeError: With the numbers.
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise RecipeError(f"tokens are {tokens.dtype} {list(tokens.shape)}", "give a 1-D int64 tensor of token ids")
    if context < 2:
        raise RecipeError(f"a context of {context} predicts nothing", "use at least 2 tokens")
    if len(tokens) < 2:
        raise RecipeError(f"the text has {len(tokens)} tokens, nothing can be predicted", "use a longer text")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < context:
        raise RecipeError(
            f"a context of {context} is longer than the model's {limit} positions", f"use at most {limit}"
        )
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise RecipeError(
            f"token ids reach from {low} to {high}, the model knows 0 to {vocabulary - 1}",
            "tokenize the text with this model's own tokenizer",
        )


def windows(tokens: Tensor, context: int) -> Iterator[Tensor]:
    """Yield consecutive non-overlapping windows; a last one of a single token is dropped, as it predicts nothing."""
    for start in range(0, len(tokens) - 1, context):
        yield tokens[start : start + context]


@torch.no_grad()
def window_logits(model: PreTrainedModel, window: Tensor, who: str, index: int) -> Tensor:
    """Return the logits that predict `window[1:]`, `[len(window) - 1, vocabulary]` in the model's dtype.

    Raises:
        VerificationError: NaN or Inf among them.
    """
    logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(-1).nonzero()[0])
        raise VerificationError(
            f"{who}: logits of window {index}, position {bad} are NaN or Inf", "its weights or its dtype are broken"
        )
    return logits


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, float64 `[n]` on the CPU; softmax in float32."""
    parts = []
    for rows, wanted in zip(logits.split(ROWS), targets.to(logits.device).split(ROWS), strict=True):
        parts.append(-rows.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
    return torch.cat(parts).double().cpu()


def segment_sums(values: Tensor) -> tuple[float, ...]:
    """Return the float64 sums of per-token values `[n]` over segments of consecutive tokens."""
    return tuple(float(part.sum()) for part in values.double().split(SEGMENT))


def exponential(nll: Estimate) -> Estimate:
    """Return `exp` of a mean negative log-likelihood; its standard error by the delta method: `exp(m) * se(m)`.

    Raises:
        VerificationError: The perplexity is larger than any float.
    """
    if nll.value > math.log(torch.finfo(torch.float64).max):
        raise VerificationError(f"a mean loss of {nll.value:.4g} nats per token", "the model's weights are broken")
    value = math.exp(nll.value)
    return Estimate(value, None if nll.standard_error is None else value * nll.standard_error)


def _segment_hash(targets: Tensor, context: int) -> str:
    digest = hashlib.sha256(f"{context}\0".encode())
    digest.update(targets.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
