"""Perplexity over fixed windows of a text, and standard errors that know neighbouring tokens are correlated.

Windows do not overlap: every window of `context` tokens starts without memory of the one before, and its first token is
not predicted. A last, shorter window counts if it holds at least two tokens.

Standard errors are clustered: the error of token after token inside one text is correlated, so treating tokens as
independent would make every error bar too short. Predictions are cut into segments of 128 consecutive ones (a paragraph
or so, beyond which correlation is weak); only differences between segments count as noise. For a mean over `n`
predictions in `G` segments with sums `S_g` of `n_g` values, `var = G/(G-1) * sum_g (S_g - mean * n_g)^2 / n^2`, the
usual ratio estimator, which is the plain standard error of segment means when segments are equally long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import RecipeError, VerificationError

SEGMENT = 128
"""Predictions per segment."""

ROWS = 128
"""Rows of logits that are turned into probabilities at once; bounds memory at vocabularies of any size."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; the error is None where the data is too little to give one."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return plain data."""
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: `exp` of the mean negative log-likelihood; its error by the delta method.
        nll: Mean negative log-likelihood in nats per token.
        n_tokens: Predicted tokens.
    """

    perplexity: Estimate
    nll: Estimate
    n_tokens: int


def perplexity(
    model: PreTrainedModel, tokens: Tensor, context: int, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Measure a model.

    Args:
        model: A causal language model.
        tokens: int64 `[n]`.
        context: Tokens per window.
        progress: Called with windows done and windows in all.

    Raises:
        RecipeError: Too few tokens, or a context the model cannot take.
        VerificationError: Logits that are not finite.
    """
    check_tokens(tokens, context, model)
    parts = []
    cut = list(windows(tokens, context))
    for done, window in enumerate(cut, 1):
        parts.append(token_nll(window_logits(model, window, "the model", done - 1), window[1:]))
        if progress:
            progress(done, len(cut))
    values = torch.cat(parts)
    nll = clustered_mean(values)
    return Perplexity(exponential(nll), nll, len(values))


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


def clustered_mean(values: Tensor, segment: int = SEGMENT) -> Estimate:
    """Return the mean of per-token values `[n]` and its standard error over segments of consecutive tokens.

    A last, shorter segment counts with its length. With fewer than two segments there is no error to give.
    """
    values = values.double()
    mean = values.mean()
    residuals = torch.stack([(part - mean).sum() for part in values.split(segment)])  # [segments]
    count = len(residuals)
    if count < 2:
        return Estimate(float(mean), None)
    variance = count / (count - 1) * residuals.square().sum() / len(values) ** 2
    return Estimate(float(mean), float(variance.sqrt()))


def exponential(nll: Estimate) -> Estimate:
    """Return `exp` of a mean negative log-likelihood; its standard error by the delta method: `exp(m) * se(m)`.

    Raises:
        VerificationError: The perplexity is larger than any float.
    """
    if nll.value > math.log(torch.finfo(torch.float64).max):
        raise VerificationError(f"a mean loss of {nll.value:.4g} nats per token", "the model's weights are broken")
    value = math.exp(nll.value)
    return Estimate(value, None if nll.standard_error is None else value * nll.standard_error)
