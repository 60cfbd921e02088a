"""The interpreter's documentation as calibration text: prose, deterministic, and disjoint between its two splits."""

from __future__ import annotations

import re
import sys

import pytest

from compressor.calibration.presets import PRESETS, python_docs
from compressor.errors import RecipeError


def test_same_text_on_every_call() -> None:
    assert python_docs("calibration") == python_docs("calibration")
    assert python_docs("evaluation") == python_docs("evaluation")


def test_splits_share_no_paragraph_and_none_repeats() -> None:
    calibration, evaluation = (python_docs(split).split("\n\n") for split in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)


def test_splits_hold_enough_text_for_the_defaults() -> None:
    # 32 windows of 512 tokens at the four characters a token that byte-pair vocabularies reach on English prose
    assert len(python_docs("calibration")) > 2 * 32 * 512 * 4
    assert len(python_docs("evaluation")) > 8192 * 4


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_markup_is_gone_and_whitespace_collapsed(split: str) -> None:
    for paragraph in python_docs(split).split("\n\n"):
        assert "\n" not in paragraph
        assert "  " not in paragraph
        assert "::=" not in paragraph
        assert not paragraph.startswith((">>>", "+-", "|"))
        assert not re.search(r"[=*~-]{8,}", paragraph), paragraph
        assert len(paragraph.split()) >= 8


def test_evaluation_comes_from_topics_calibration_never_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    sentence = "This sentence is about the topic called {} and about nothing else at all."
    shared = "This sentence is quoted by every one of the topics, word for word."
    made = {f"t{i:02}": f"{sentence.format(i)}\n\n{shared}\n\n   x ::= y\n\nHeading\n=======\n" for i in range(10)}
    monkeypatch.setattr(topics, "topics", dict(reversed(made.items())))
    first = [sentence.format(i) for i in range(10)]
    assert python_docs("calibration").split("\n\n") == [first[0], shared, *first[1:8]]
    assert python_docs("evaluation").split("\n\n") == first[8:]


def test_python_without_topics_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RecipeError, match="no documentation topics") as caught:
        python_docs("calibration")
    assert "--data FILE" in caught.value.hint


def test_table_of_presets() -> None:
    assert PRESETS["python-docs"].text is python_docs
    assert PRESETS["self"].text is None
    assert all(preset.summary for preset in PRESETS.values())
