"""Read calibration and evaluation text from presets, local files and the Hub, as documents in the order they stand."""

from __future__ import annotations

import codecs
import difflib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from compressor.calibration.presets import PRESETS, Split
from compressor.errors import CheckpointError, CompressorError, HubError, RecipeError, UnsupportedError, did_you_mean
from compressor.offline import forbidden_by

Message: TypeAlias = dict[str, str]

MAX_LINE_BYTES = 16 << 20
"""Of one row of a .jsonl file; a line is held in memory as a whole."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SUFFIXES = (".txt", ".jsonl")
_ROW_SHAPES = '{"text": ...}, {"messages": [{"role": ..., "content": ...}]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Document:
    """One text, or one conversation still to be rendered by the model's chat template; exactly one is set.

    Attributes:
        text: Plain text.
        messages: Conversation in order.
        where: `file:line` or `dataset row n`, for error messages.
    """

    text: str | None
    messages: tuple[Message, ...] | None
    where: str

    @property
    def n_chars(self) -> int:
        """Characters of content."""
        return len(self.text) if self.text is not None else sum(len(m["content"]) for m in self.messages or ())


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        documents: At least one, none of them empty.
        origin: Where the text came from, in words, for the record.
        split: Split of a preset or Hub dataset; "all" for a file.
        events: Sentences about what was left out.
    """

    documents: tuple[Document, ...]
    origin: str
    split: str = "all"
    events: tuple[str, ...] = ()


def read(data: str, *, preset_split: Split, hub_split: str | None, text_column: str, max_chars: int) -> Reading:
    """Read documents from `data` until `max_chars` characters are there; the rest is never touched.

    Args:
        data: A preset's name, a path to a .txt or .jsonl file, or a Hub dataset id.
        preset_split: Which part of a preset.
        hub_split: Split of a Hub dataset; None where only presets and files are read.
        text_column: Key of the text in .jsonl rows and Hub datasets.
        max_chars: A bound, not a promise; what lies beyond it is reported as an event.

    Raises:
        RecipeError: Unknown preset, kind of file, split or column; or a preset without text of its own.
        CheckpointError: File missing, empty, not UTF-8 text, or with a row that cannot be used.
        HubError: The dataset could not be reached, or offline mode forbids it.
        UnsupportedError: The dataset needs code to be run.
    """
    if data in PRESETS:
        load = PRESETS[data].text
        if load is None:
            raise RecipeError(
                f"data {data!r} is written by the model while calibrating: it has no text to read",
                f"use {' or '.join(name for name, p in PRESETS.items() if p.text)}, or a .txt or .jsonl file",
            )
        text = load(preset_split)
        origin = f"{data} ({preset_split}) of Python {platform.python_version()}"
        return Reading((Document(text, None, data),), origin, preset_split)
    path = Path(data).expanduser()
    if path.exists() or path.suffix in (*_SUFFIXES, ".json") or data.startswith((".", "/", "~")):
        return _read_file(path, text_column, max_chars)
    if not _HUB_ID.fullmatch(data) or (
        "/" not in data and difflib.get_close_matches(data.lower(), PRESETS, cutoff=0.6)
    ):
        raise did_you_mean("calibration data", data, PRESETS)
    if hub_split is None:
        raise RecipeError(
            f"data {data!r} is neither a preset nor a file",
            f"use one of {', '.join(n for n, p in PRESETS.items() if p.text)}, or a .txt or .jsonl file",
        )
    rows = _hub_rows(data, hub_split)
    return replace(_collect(rows, text_column, max_chars, data, data), split=hub_split)


def _read_file(path: Path, text_column: str, max_chars: int) -> Reading:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", "check the path; presets are " + ", ".join(PRESETS))
    if path.is_dir() or path.suffix not in _SUFFIXES:
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise RecipeError(f"{path}: text is read from .txt and .jsonl files, this is {kind}", f"rows: {_ROW_SHAPES}")
    try:
        if path.suffix == ".txt":
            return _read_text(path, max_chars)
        return _collect(_json_rows(path), text_column, max_chars, path.name, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error


def _read_text(path: Path, max_chars: int) -> Reading:
    with path.open("rb") as file:
        raw = file.read(max_chars)
        cut = bool(file.read(1))
    text = _decoded(raw, path.name, final=not cut).replace("\r\n", "\n")
    if not text.strip():
        raise CheckpointError(f"{path}: the file holds no text ({path.stat().st_size} bytes)", "pass a file with text")
    events = (f"{path.name}: only the first {len(raw)} of {path.stat().st_size} bytes were read",) if cut else ()
    return Reading((Document(text, None, path.name),), path.name, events=events)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{path.name}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise CheckpointError(
                    f"{where}: a line of more than {MAX_LINE_BYTES} bytes", "write one document a line, or a .txt file"
                )
            line = _decoded(raw, where).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise CheckpointError(f"{where}: nested too deeply", f"rows: {_ROW_SHAPES}") from None
            except ValueError as error:
                raise CheckpointError(f"{where}: not JSON: {error}", "each line must be one JSON object") from None
            if not isinstance(row, dict):
                raise CheckpointError(f"{where}: a row is an object, not {type(row).__name__}", f"rows: {_ROW_SHAPES}")
            yield where, row


def _hub_rows(data: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the rows of a Hub dataset; nothing is written to the datasets cache."""
    if variable := forbidden_by():
        raise HubError(
            f"data {data!r} is a Hub dataset and {variable} forbids fetching it",
            f"unset {variable}, use a preset ({', '.join(PRESETS)}), or pass a .txt or .jsonl file",
        )
    import datasets  # type: ignore[import-untyped]  # takes seconds, and only this function needs it

    name, _, config = data.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{data} row {number}", row
    except Exception as error:
        raise _hub_failure(error, data, split) from error


def _hub_failure(error: Exception, data: str, split: str) -> Exception:
    """Sort what `datasets` raises; an error of no known kind comes back unchanged."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ValueError):  # unknown config or split; the message lists those that exist
        return RecipeError(f"dataset {data!r}, split {split!r}: {first_line}", "name a config as owner/name:config")
    if isinstance(error, RuntimeError):
        return UnsupportedError(f"dataset {data!r}: {first_line}", "save its text as .jsonl and pass the file")
    # "Not found" is an OSError, and what the Hub says of private datasets too. HTTP clients have errors of their own,
    # and which client the Hub library uses has changed before.
    clients = ("aiohttp", "datasets", "httpcore", "httpx", "huggingface_hub", "requests")
    if isinstance(error, OSError) or type(error).__module__.startswith(clients):
        return HubError(
            f"dataset {data!r} could not be read from the Hub: {first_line}",
            f"check the name, the network and your login; presets that need none: {', '.join(PRESETS)}",
        )
    return error


def _collect(
    rows: Iterable[tuple[str, dict[str, Any]]], text_column: str, max_chars: int, origin: str, name: str
) -> Reading:
    documents: list[Document] = []
    n_chars = 0
    for where, row in rows:
        if n_chars >= max_chars:
            events = (f"{origin}: only the first {len(documents)} rows with text ({n_chars} characters) were read",)
            return Reading(tuple(documents), origin, events=events)
        document = _document(where, row, text_column)
        if document.n_chars:
            documents.append(document)
            n_chars += document.n_chars
    if not documents:
        raise CheckpointError(f"{name}: no row holds any text", "pass data with text")
    return Reading(tuple(documents), origin)


def _document(where: str, row: dict[str, Any], text_column: str) -> Document:
    """Turn one row into a document; a blank text is allowed and counts as empty."""
    if text_column in row:
        text = row[text_column]
        if not isinstance(text, str):
            raise _bad_row(where, f"{text_column!r} is {type(text).__name__}, not a string")
        _check_text(where, text)
        return Document(text if text.strip() else "", None, where)
    if "messages" in row:
        return Document(None, _messages(where, row["messages"]), where)
    if "prompt" in row and "completion" in row:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return Document(None, _messages(where, turns), where)
    columns = ", ".join(sorted(row)) or "none"
    raise RecipeError(
        f"{where}: no {text_column!r}, 'messages', or 'prompt' with 'completion'; columns: {columns}",
        f"name the text column, or write rows as {_ROW_SHAPES}",
    )


def _messages(where: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _bad_row(where, "'messages' is not a list with at least one message")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise _bad_row(where, f"a message needs 'role' and 'content' as strings, found {json.dumps(message)[:80]}")
        _check_text(where, message["role"] + message["content"])
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _check_text(where: str, text: str) -> None:
    """Refuse escapes such as `\\ud800` that JSON lets through and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad_row(where, f"half a surrogate pair at character {error.start}") from None


def _bad_row(where: str, problem: str) -> CompressorError:
    return CheckpointError(f"{where}: {problem}", f"rows: {_ROW_SHAPES}")


def _decoded(raw: bytes, where: str, *, final: bool = True) -> str:
    """Decode UTF-8 strictly; with `final=False` a character cut at the end is dropped."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (nul := raw.find(0)) >= 0:
        what = "starts like UTF-16" if raw[:1] in (b"\xff", b"\xfe") else f"NUL byte at offset {nul}"
        raise CheckpointError(f"{where}: not UTF-8 text: {what}", "save the file as UTF-8; binary files hold no text")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}: not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}",
            "convert it, for example: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from None
    return text.removeprefix("\ufeff")
