"""How much of what an encoder makes of sentences survives: cosines of sentence embeddings before and after.

An embedding is the mean of the last hidden states over a sentence's tokens, scaled to length one, which is how
sentence-transformers pool them by default. Both models get the same tokens. Beside the cosine of each sentence's two
embeddings, the share of sentences whose nearest neighbour stays the same says what a search would notice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import RecipeError, VerificationError
from compressor.evals.scores import Estimate, Samples, TaskResult

VERSION = "1"
"""Of the definition; raise it when a change to sentences, pooling or metrics changes scores."""

BATCH = 16
"""Sentences per forward pass; of similar length, so that little is padded."""

FEWEST_WORDS = 6
"""Shorter pieces are headings and debris."""

LOW = 0.05
"""Share of sentences that are worse than the reported low cosine."""


@dataclass(frozen=True)
class Sentences:
    """What is embedded.

    Attributes:
        name: Preset or file name, for reports.
        texts: The sentences.
        max_tokens: Tokens after which one is cut off.
    """

    name: str
    texts: tuple[str, ...]
    max_tokens: int

    def settings(self) -> dict[str, Any]:
        """Return what scores on these sentences depend on."""
        joined = "\0".join(self.texts).encode()
        return {
            "text": self.name,
            "text_sha256": hashlib.sha256(joined).hexdigest(),
            "sentences": len(self.texts),
            "max_tokens": self.max_tokens,
            "pooling": "mean",
        }


def find_sentences(text: str, limit: int) -> tuple[str, ...]:
    """Return the first sentences of a text, each at its first occurrence; headings and very short ones are left out.

    Raises:
        RecipeError: There are fewer than two.
    """
    pieces = (piece.strip() for line in text.splitlines() for piece in re.split(r"(?<=[.!?])\s+", line))
    found = dict.fromkeys(p for p in pieces if len(p.split()) >= FEWEST_WORDS and not p.startswith("="))
    sentences = tuple(found)[:limit]
    if len(sentences) < 2:
        raise RecipeError(f"{len(sentences)} sentences in the text", "give a longer text with --text")
    return sentences


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: Sentences,
    who: str = "the model",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return one embedding per sentence, of length one, float32 `[sentences, width]` on the CPU.

    Args:
        model: A model without a head.
        tokenizer: Its tokenizer.
        sentences: What to embed.
        who: What errors call the model.
        progress: Called with sentences done and sentences in all.

    Raises:
        RecipeError: The model cannot take so many tokens, or the tokenizer cannot pad.
        VerificationError: Embeddings that are not finite.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < sentences.max_tokens:
        raise RecipeError(
            f"sentences of {sentences.max_tokens} tokens are longer than the model's {limit} positions",
            f"use at most --context {limit}",
        )
    ids = [tokenizer(text, truncation=True, max_length=sentences.max_tokens)["input_ids"] for text in sentences.texts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    rows: list[Tensor] = [torch.empty(0)] * len(ids)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, row in zip(chosen, _pooled(model, [ids[i] for i in chosen]), strict=True):
            rows[index] = row
        if progress:
            progress(min(start + BATCH, len(order)), len(order))
    out = torch.stack(rows)
    if not torch.isfinite(out).all():
        raise VerificationError(f"{who}: embeddings are NaN or Inf", "its weights or its dtype are broken")
    return out


def compare_embeddings(ours: Tensor, theirs: Tensor, sentences: Sentences) -> TaskResult:
    """Return cosines and kept neighbours.

    Args:
        ours: Embeddings of the compressed model, `[sentences, width]`, of length one.
        theirs: Those of the original.
        sentences: What was embedded.

    Raises:
        RecipeError: The models embed into spaces of different width.
    """
    if ours.shape != theirs.shape:
        raise RecipeError(
            f"embeddings have {ours.shape[-1]} and {theirs.shape[-1]} dimensions",
            "compare a compressed model with the model it was made from",
        )
    cosine = (ours.double() * theirs.double()).sum(-1).clamp_(-1, 1)
    kept = _neighbours(ours) == _neighbours(theirs)
    samples = Samples(
        id=tuple(range(len(cosine))),
        hash=tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in sentences.texts),
        weight=(1,) * len(cosine),
        values={"cosine": tuple(cosine.tolist()), "neighbour": tuple(kept.double().tolist())},
    )
    low = float(cosine.sort().values[int(LOW * len(cosine))])
    metrics = {
        "cosine": samples.mean("cosine"),
        "cosine_low": Estimate(low, None),
        "neighbour": samples.mean("neighbour"),
    }
    return TaskResult(VERSION, sentences.settings(), metrics, samples)


def _pooled(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> Tensor:
    """Return the embeddings of a few tokenized sentences; padding is masked and adds nothing."""
    width = max(len(ids) for ids in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, ids in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    states = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    kept = mask[..., None].to(states.device)  # [sentences, tokens, 1]
    mean = (states.float() * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def _neighbours(embeddings: Tensor) -> Tensor:
    """Return the index of every sentence's nearest other sentence."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(-1)
