"""Turn text into the token windows that calibrate a model, the same ones on every machine.

Text is tokenized once, laid end to end and cut into windows that do not overlap; a seeded permutation picks some.
Perplexity uses the two helpers at the end.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from compressor.calibration.presets import PRESETS
from compressor.calibration.sources import Document, read
from compressor.errors import CheckpointError, RecipeError
from compressor.recipe import CalibrationSpec

Tokenizer: TypeAlias = Any
"""A transformers tokenizer; typed loosely because its call operator is."""

POOL_FACTOR = 64
"""Windows are picked among the first `POOL_FACTOR` times as many tokens as are needed; later text is not read."""

_CHARS_PER_TOKEN = 4
_GENERATED = "self"


class Generate(Protocol):
    """Lets the model write its own calibration text."""

    def __call__(self, n_samples: int, seq_len: int, seed: int, /) -> Tensor:
        """Return token ids, int64 `[n_samples, seq_len]`; the same for the same seed."""
        ...


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows and where they came from.

    Attributes:
        tokens: int64 `[n_samples, seq_len]`; pixels of images are float32 `[n_samples, n, channels, height, width]`.
        source: JSON-ready description: data, origin, split, seed, n_samples, seq_len (or images).
        fingerprint: Hex SHA-256 of shape and values.
        events: Sentences about fall-backs and text left out; each ends in the report.
        reserve: int64 `[n, seq_len]`, further windows for experts that too few tokens reach; None for none.
    """

    tokens: Tensor
    source: dict[str, str | int]
    fingerprint: str
    events: tuple[str, ...] = ()
    reserve: Tensor | None = None


def build(
    spec: CalibrationSpec,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int = 0,
    generate: Generate | None = None,
    reserve: int = 0,
) -> CalibrationSet:
    """Build the calibration set.

    Plain documents are joined by blank lines and get special tokens (a BOS, say) once at the start, and only if the
    tokenizer adds them by default. Conversations are rendered by the chat template, which places its own special
    tokens. Windows stay in the order in which they stand in the text. At most `POOL_FACTOR` times the needed amount of
    text is read, at four characters a token; a longer source is reported as an event.

    Args:
        spec: Data and amounts. Whether `seq_len` fits the model is for the caller to check.
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding; every id must be below it.
        seed: Picks the windows, and seeds `generate`.
        generate: Needed for data "self" only.
        reserve: Pick so many windows more, or as many as are left; none of text the model writes. Which windows are
            picked as `tokens` does not depend on it.

    Raises:
        RecipeError: Too little text for `n_samples` windows, or the data is not known.
        CheckpointError: Unreadable data, or the tokenizer makes ids the model does not have.
        HubError: A Hub dataset could not be had.
    """
    if spec.data == _GENERATED:
        return _generated(spec, tokenizer, vocab_size, seed, generate)
    needed = spec.n_samples * spec.seq_len
    reading = read(
        spec.data,
        preset_split="calibration",
        hub_split=spec.split,
        text_column=spec.text_column,
        max_chars=POOL_FACTOR * needed * _CHARS_PER_TOKEN,
    )
    ids, events = _encode(reading.documents, tokenizer)
    ids = ids[: POOL_FACTOR * needed]
    _check_vocabulary(ids, tokenizer, vocab_size)
    tokens, further = _windows(ids, spec, seed, reserve)
    sealed = _sealed(tokens, spec, seed, reading.origin, reading.split, (*reading.events, *events))
    return sealed if not len(further) else replace(sealed, reserve=further)


def load_text(data: str, *, text_column: str = "text", max_chars: int = 1 << 28) -> str:
    """Return evaluation text: the evaluation split of a preset, or all of a .txt or .jsonl file.

    Rows are joined by blank lines; a conversation contributes its contents without any template, so that perplexity is
    measured on the words alone.

    Raises:
        RecipeError: Not a preset with text, nor a .txt or .jsonl file, or longer than `max_chars`.
        CheckpointError: The file is missing, empty, not UTF-8, or has a row that cannot be used.
    """
    reading = read(data, preset_split="evaluation", hub_split=None, text_column=text_column, max_chars=max_chars)
    if reading.events:  # a score on part of the text would be compared with scores on all of it
        raise RecipeError(f"{data}: more than {max_chars} characters of text", "pass a smaller file")
    return "\n\n".join(_plain(document) for document in reading.documents)


def tokenize(text: str, tokenizer: Tokenizer, vocab_size: int, limit: int | None = None) -> Tensor:
    """Return the token ids of `text`, int64 `[tokens]`, special tokens only where the tokenizer adds them by default.

    Args:
        text: Any text.
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.
        limit: Keep the first so many tokens; text far beyond them is not tokenized.

    Raises:
        CheckpointError: The tokenizer makes ids the model does not have.
    """
    taken = len(text) if limit is None else limit * 2 * _CHARS_PER_TOKEN
    ids = _ids(tokenizer, text[:taken])
    while limit is not None and len(ids) <= limit + 8 and taken < len(text):  # the cut may change the last few tokens
        taken *= 2
        ids = _ids(tokenizer, text[:taken])
    ids = ids[:limit]
    _check_vocabulary(ids, tokenizer, vocab_size)
    return ids


def _generated(
    spec: CalibrationSpec, tokenizer: Tokenizer, vocab_size: int, seed: int, generate: Generate | None
) -> CalibrationSet:
    if generate is None:
        others = ", ".join(name for name in PRESETS if name != _GENERATED)
        raise RecipeError(
            f"data {_GENERATED!r} needs a model that can generate text; this one cannot", f"use {others}, or a file"
        )
    tokens = generate(spec.n_samples, spec.seq_len, seed).to("cpu", torch.int64)
    assert tokens.shape == (spec.n_samples, spec.seq_len), tokens.shape
    _check_vocabulary(tokens.flatten(), tokenizer, vocab_size)
    return _sealed(tokens, spec, seed, "generated by the model", "all", ())


def _sealed(
    tokens: Tensor, spec: CalibrationSpec, seed: int, origin: str, split: str, events: tuple[str, ...]
) -> CalibrationSet:
    source: dict[str, str | int] = {
        "data": spec.data,
        "origin": origin,
        "split": split,
        "seed": seed,
        "n_samples": spec.n_samples,
        "seq_len": spec.seq_len,
    }
    return CalibrationSet(tokens, source, fingerprint(tokens), events)


def fingerprint(tokens: Tensor) -> str:
    """Return the hex SHA-256 of shape and values, whatever machine computes it.

    Values count as little-endian int64, those of images as float32.
    """
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.contiguous().numpy().astype("<f4" if tokens.is_floating_point() else "<i8").tobytes())
    return digest.hexdigest()


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[Tensor, tuple[str, ...]]:
    """Tokenize documents in order; neighbouring plain ones are one text."""
    parts: list[Tensor] = []
    n_untemplated = 0
    first_plain = True
    for is_chat, run in itertools.groupby(documents, key=lambda d: d.messages is not None):
        if is_chat and getattr(tokenizer, "chat_template", None):
            parts.extend(_ids(tokenizer, _rendered(d, tokenizer), special_tokens=False) for d in run)
            continue
        run_documents = list(run)
        n_untemplated += len(run_documents) if is_chat else 0
        parts.append(_ids(tokenizer, _joined(run_documents), special_tokens=first_plain))
        first_plain = False
    note = (
        f"the tokenizer has no chat template: the messages of {n_untemplated} conversations were joined as plain text"
    )
    return torch.cat(parts), (note,) if n_untemplated else ()


def _joined(documents: Iterable[Document]) -> str:
    return "\n\n".join(_plain(d).rstrip("\n") for d in documents) + "\n\n"


def _plain(document: Document) -> str:
    if document.messages is None:
        return document.text or ""
    return "\n\n".join(message["content"] for message in document.messages)


def _rendered(document: Document, tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(document.messages or ()), tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in document.messages or ())
        raise CheckpointError(
            f"{document.where}: the model's chat template refuses this conversation (roles {roles}): {error}",
            "change the row to roles and an order the template accepts",
        ) from error


def _ids(tokenizer: Tokenizer, text: str, *, special_tokens: bool = True) -> Tensor:
    # verbose=False: one long text is meant, so the warning about the model's maximum length would mislead
    ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check_vocabulary(ids: Tensor, tokenizer: Tokenizer, vocab_size: int) -> None:
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise CheckpointError(
            f"token id {largest} ({token!r}) is outside the model's vocabulary of {vocab_size}",
            "the tokenizer and the model do not belong together: check the checkpoint's tokenizer files",
        )


def _windows(ids: Tensor, spec: CalibrationSpec, seed: int, reserve: int) -> tuple[Tensor, Tensor]:
    available = ids.numel() // spec.seq_len
    if available < spec.n_samples:
        less = f"--n-samples {available}" if available else f"--seq-len {max(2, ids.numel())} --n-samples 1"
        raise RecipeError(
            f"{spec.data}: needs {spec.n_samples} x {spec.seq_len} = {spec.n_samples * spec.seq_len} tokens, "
            f"the data has {ids.numel()}",
            f"use {less} or more text",
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    windows = ids[: available * spec.seq_len].view(available, spec.seq_len)
    picked = order[: spec.n_samples].sort().values
    further = order[spec.n_samples : spec.n_samples + reserve].sort().values
    return windows[picked].clone(), windows[further].clone()  # [n_samples, seq_len], [at most reserve, seq_len]
