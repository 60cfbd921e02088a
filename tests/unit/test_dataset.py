"""Calibration windows: the right tokens, the same everywhere, and every kind of bad data named before work starts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compressor.calibration.dataset import POOL_FACTOR, build, fingerprint, load_text, tokenize
from compressor.calibration.presets import python_docs
from compressor.errors import CheckpointError, HubError, RecipeError
from compressor.recipe import CalibrationSpec
from compressor.testing.models import tiny_tokenizer

VOCAB = len(tiny_tokenizer())


def words(n: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(n))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path: Path, *rows: object) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def spec(data: str, n_samples: int = 3, seq_len: int = 16, **more: Any) -> CalibrationSpec:
    return CalibrationSpec(data=data, n_samples=n_samples, seq_len=seq_len, **more)


def all_tokens(data: str, tokenizer: Any, seq_len: int, vocab_size: int = VOCAB) -> Tensor:
    """Every whole window of the data, in order."""
    for n in range(1, 10_000):
        try:
            tokens = build(spec(data, n, seq_len), tokenizer, vocab_size).tokens
        except RecipeError:
            return tokens
    raise AssertionError("too much data for this helper")


# --- windows ---


def test_windows_are_slices_of_the_text_in_order(tmp_path: Path) -> None:
    text = words(400, seed=1)
    tokenizer = tiny_tokenizer()
    result = build(spec(write(tmp_path / "a.txt", text), 20, 16), tokenizer, VOCAB, seed=7)
    ids = tokenizer(text)["input_ids"]
    starts = [next(i for i in range(0, len(ids), 16) if ids[i : i + 16] == row) for row in result.tokens.tolist()]
    assert result.tokens.dtype == torch.int64
    assert result.tokens.shape == (20, 16)
    assert starts == sorted(set(starts))
    assert starts != list(range(0, 320, 16)), "windows come from the whole text, not only from its start"


def test_same_seed_same_set_other_seed_other_set(tmp_path: Path) -> None:
    data = write(tmp_path / "a.txt", words(400, seed=2))
    one, same, other = (build(spec(data, 8), tiny_tokenizer(), VOCAB, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.tokens, same.tokens)
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.source == same.source
    assert {"seed": 3, "n_samples": 8, "seq_len": 16, "data": data, "split": "all"}.items() <= one.source.items()
    json.dumps(one.source)


def test_fingerprint_depends_on_shape_and_every_id() -> None:
    tokens = torch.arange(12)
    prints = {fingerprint(tokens.view(3, 4)), fingerprint(tokens.view(4, 3)), fingerprint(tokens.flip(0).view(3, 4))}
    assert len(prints) == 3
    # SHA-256 of the text "(1, 2)" followed by 1 and 258 as little-endian int64
    known = "93384b219bbdb49768d50c092881c25100babcc11738227d89ff5643aa210aae"
    assert fingerprint(torch.tensor([[1, 258]])) == known


def test_default_preset_fills_the_default_amount() -> None:
    result = build(CalibrationSpec(), tiny_tokenizer(), VOCAB)
    assert result.tokens.shape == (32, 512)
    assert result.events == ()
    assert result.source["split"] == "calibration"
    text = tiny_tokenizer().decode(result.tokens[0])
    assert text in python_docs("calibration")


def test_bos_only_where_the_tokenizer_adds_it_and_once(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", *({"text": words(30, seed=s)} for s in range(5)))
    plain, with_bos = tiny_tokenizer(), tiny_tokenizer(add_bos=True)
    assert not (all_tokens(data, plain, 16) == plain.bos_token_id).any()
    found = all_tokens(data, with_bos, 16)
    assert found[0, 0] == with_bos.bos_token_id
    assert (found == with_bos.bos_token_id).sum() == 1


def test_rows_are_joined_by_blank_lines_and_empty_ones_skipped(tmp_path: Path) -> None:
    rows = [{"text": "first row\n"}, {"text": ""}, {"text": "  \n"}, {"text": "second row"}]
    data = write_rows(tmp_path / "a.jsonl", *rows)
    tokenizer = tiny_tokenizer()
    expected = tokenizer("first row\n\nsecond row\n\n")["input_ids"]
    assert all_tokens(data, tokenizer, 2).flatten().tolist() == expected[: len(expected) // 2 * 2]


def test_other_text_column(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", {"body": words(40, seed=5), "text": "not this"})
    result = build(spec(data, 2, text_column="body"), tiny_tokenizer(), VOCAB)
    assert "not this" not in tiny_tokenizer().decode(result.tokens.flatten())


# --- conversations ---

CHAT = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"}]}
PAIR = {"prompt": "hello there", "completion": "good day"}


@pytest.mark.parametrize("row", [CHAT, PAIR], ids=["messages", "prompt+completion"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_conversations_go_through_the_chat_template(tmp_path: Path, row: dict[str, Any], add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=True, add_bos=add_bos)
    data = write_rows(tmp_path / "a.jsonl", row, row)
    rendered = "<bos>user\nhello there<eos>\n<bos>assistant\ngood day<eos>\n" * 2
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 4, "the template's own markers and no others"
    result = build(spec(data, 1, len(expected)), tokenizer, VOCAB)
    assert result.tokens[0].tolist() == expected
    assert result.events == ()


def test_without_a_template_conversations_are_joined_and_it_is_said(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", CHAT, PAIR)
    result = build(spec(data, 1, 20), tiny_tokenizer(), VOCAB)
    assert tiny_tokenizer().decode(result.tokens[0]).startswith("hello there\n\ngood day\n\nhel")
    assert len(result.events) == 1
    assert "2 conversations" in result.events[0]


def test_template_that_refuses_names_the_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    data = write_rows(tmp_path / "a.jsonl", {"text": "fine"}, CHAT)
    with pytest.raises(CheckpointError, match=r"a\.jsonl:2.*roles must alternate"):
        build(spec(data), tokenizer, VOCAB)


# --- the model's own words ---


def test_self_uses_the_callers_generator() -> None:
    seen: list[tuple[int, int, int]] = []

    def generate(n_samples: int, seq_len: int, seed: int) -> Tensor:
        seen.append((n_samples, seq_len, seed))
        return torch.randint(0, VOCAB, (n_samples, seq_len), generator=torch.Generator().manual_seed(seed))

    result = build(spec("self"), tiny_tokenizer(), VOCAB, seed=11, generate=generate)
    assert seen == [(3, 16, 11)]
    assert torch.equal(result.tokens, generate(3, 16, 11))
    assert result.fingerprint == fingerprint(result.tokens)
    with pytest.raises(CheckpointError, match="outside the model's vocabulary of 10"):
        build(spec("self"), tiny_tokenizer(), 10, generate=generate)


def test_self_without_a_generator_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a model that can generate") as caught:
        build(spec("self"), tiny_tokenizer(), VOCAB)
    assert "python-docs" in caught.value.hint


# --- errors before any work ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n ", "no text"),
        ("a.jsonl", b"\n\n", "no row holds any text"),
        ("a.jsonl", b'{"text": ""}\n', "no row holds any text"),
        ("a.txt", b"abc\x00def", "NUL byte at offset 3"),
        ("a.txt", "grün".encode("utf-16"), "starts like UTF-16"),
        ("a.txt", "grün".encode("latin-1"), "byte 0xfc at offset 2"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "gr\xfcn"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": }\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: a row is an object, not list"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' is int"),
        ("a.jsonl", b'{"messages": []}\n', r"a\.jsonl:1: 'messages' is not a list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: a message needs 'role' and 'content'"),
        ("a.jsonl", b'{"prompt": "a", "completion": 3}\n', r"a\.jsonl:1: a message needs"),
    ],
)
def test_bad_files_are_named_with_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    data = write(tmp_path / name, content)
    for attempt in (lambda: build(spec(data), tiny_tokenizer(), VOCAB), lambda: load_text(data)):
        with pytest.raises(CheckpointError, match=message) as caught:
            attempt()
        assert caught.value.hint
        assert caught.value.exit_code == 4


def test_row_without_text_lists_its_columns(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", {"text": "fine"}, {"body": "x", "id": 3})
    with pytest.raises(RecipeError, match=r"a\.jsonl:2.*columns: body, id"):
        build(spec(data), tiny_tokenizer(), VOCAB)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "no/such/dir/x.txt"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        build(spec(str(tmp_path / name)), tiny_tokenizer(), VOCAB)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\nhello\n")
    with pytest.raises(RecipeError, match=r"this is a \.csv file"):
        build(spec(str(tmp_path / "a.csv")), tiny_tokenizer(), VOCAB)
    with pytest.raises(RecipeError, match="this is a folder"):
        build(spec(str(tmp_path)), tiny_tokenizer(), VOCAB)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    data = write(tmp_path / "a.txt", "x" * 900 + "\n\n")
    with pytest.raises(RecipeError, match=r"needs 100 x 16 = 1600 tokens, the data has 902") as caught:
        build(spec(data, 100), tiny_tokenizer(), VOCAB)
    assert "--n-samples 56" in caught.value.hint
    assert build(spec(data, 56), tiny_tokenizer(), VOCAB).tokens.shape == (56, 16)
    with pytest.raises(RecipeError, match="needs 1 x 4096 = 4096 tokens") as caught:
        build(spec(data, 1, 4096), tiny_tokenizer(), VOCAB)
    assert "--seq-len 902" in caught.value.hint


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    text = words(200, seed=3)
    tokenizer = tiny_tokenizer()
    largest = max(tokenizer(text)["input_ids"])
    data = write(tmp_path / "a.txt", text)
    assert build(spec(data), tokenizer, largest + 1).tokens.max() <= largest
    with pytest.raises(CheckpointError, match=f"token id {largest} .* vocabulary of {largest}"):
        build(spec(data), tokenizer, largest)
    with pytest.raises(CheckpointError, match=f"token id {largest} "):
        tokenize(text, tokenizer, largest)


def test_misspelt_preset_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="unknown calibration data 'python-doc'") as caught:
        build(spec("python-doc"), tiny_tokenizer(), VOCAB)
    assert "python-docs" in caught.value.hint


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "COMPRESSOR_OFFLINE"])
def test_hub_dataset_offline(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(HubError, match=f"'owner/name:config' is a Hub dataset and {variable}") as caught:
        build(spec("owner/name:config"), tiny_tokenizer(), VOCAB)
    assert "python-docs" in caught.value.hint
    assert caught.value.exit_code == 6


def test_unreachable_hub_dataset_through_the_real_library(tmp_path: Path) -> None:
    # The library reads its own offline switch on import, so this needs a process of its own.
    program = (
        "from compressor.calibration.sources import read\n"
        "from compressor.errors import HubError\n"
        "try:\n"
        "    read('owner/name', preset_split='calibration', hub_split='train', text_column='text', max_chars=9)\n"
        "except HubError as error:\n"
        "    print(error.message)\n"
    )
    environment = {"HF_DATASETS_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "'owner/name' could not be read from the Hub" in done.stdout


@pytest.mark.parametrize(
    "bad", [{"n_samples": 0}, {"seq_len": 1}, {"data": ""}, {"surprise": 1}, {"n_samples": "many"}, {"split": ""}]
)
def test_spec_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CalibrationSpec(**bad)


# --- bounds on reading ---


def test_large_text_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    bound = POOL_FACTOR * 2 * 4 * 4
    good = words(bound, seed=4).encode()[:bound]
    data = write(tmp_path / "a.txt", good + b"\xff" * 50)  # never reached, so never decoded
    result = build(spec(data, 2, 4), tiny_tokenizer(), VOCAB)
    assert len(result.events) == 1
    assert f"first {bound} of {bound + 50} bytes" in result.events[0]
    same = build(spec(write(tmp_path / "b.txt", good), 2, 4), tiny_tokenizer(), VOCAB)
    assert same.events == ()
    assert torch.equal(result.tokens, same.tokens)


def test_bound_inside_a_character_is_no_error(tmp_path: Path) -> None:
    bound = POOL_FACTOR * 2 * 4 * 4
    data = write(tmp_path / "a.txt", "a" + "ü" * bound)
    assert build(spec(data, 2, 4), tiny_tokenizer(), VOCAB).tokens.shape == (2, 4)


def test_large_jsonl_is_read_up_to_a_bound(tmp_path: Path) -> None:
    row = json.dumps({"text": "y" * 1000}) + "\n"
    data = write(tmp_path / "a.jsonl", row * 4 + "this line is never read\n")
    result = build(spec(data, 2, 4), tiny_tokenizer(), VOCAB)  # the bound is 2048 characters: three rows
    assert "first 3 rows" in result.events[0]


# --- evaluation ---


def test_load_text_sources(tmp_path: Path) -> None:
    assert load_text("python-docs") == python_docs("evaluation")
    assert load_text(write(tmp_path / "a.txt", "one\r\ntwo\n")) == "one\ntwo\n"
    assert load_text(write(tmp_path / "bom.txt", b"\xef\xbb\xbfone")) == "one"
    assert load_text(write_rows(tmp_path / "a.jsonl", {"text": "one"}, CHAT)) == "one\n\nhello there\n\ngood day"


@pytest.mark.parametrize("data", ["self", "owner/name", "python-dosc"])
def test_load_text_refuses_what_is_not_there(data: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_text(data)
    assert "python-docs" in caught.value.hint


def test_load_text_refuses_to_cut(tmp_path: Path) -> None:
    data = write(tmp_path / "a.txt", "z" * 100)
    assert len(load_text(data, max_chars=100)) == 100
    with pytest.raises(RecipeError, match="more than 99"):
        load_text(data, max_chars=99)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("limit", [1, 7, 500, 100_000, None])
def test_tokenize_limit_is_a_prefix_of_the_whole(limit: int | None, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    text = words(500, seed=6) + " the " * 400 + words(500, seed=7)
    whole = tokenizer(text)["input_ids"]
    found = tokenize(text, tokenizer, VOCAB, limit)
    assert found.dtype == torch.int64
    assert found.tolist() == whole[:limit]


def test_long_text_does_not_warn_about_the_models_length(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    tokenize(words(100, seed=8), tokenizer, VOCAB)
    assert not caplog.records
