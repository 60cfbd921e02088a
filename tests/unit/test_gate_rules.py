"""The grammar of gate rules: what it means, and one line for everything else."""

from pathlib import Path

import pytest

from compressor.errors import CheckpointError, RecipeError
from compressor.evals.rules import Kind, parse_rule, read_rules


@pytest.mark.parametrize(
    ("text", "metric", "at_least", "kind", "limit"),
    [
        ("blimp >= -1.0pt", "blimp", True, Kind.POINTS, -0.01),
        ("ppl <= +2%", "ppl", False, Kind.RELATIVE, 0.02),
        ("kl <= 0.05", "kl", False, Kind.VALUE, 0.05),
        ("nll<=+0.02", "nll", False, Kind.DIFFERENCE, 0.02),
        ("  arc_easy.acc   >=  -.5 pt ", "arc_easy.acc", True, Kind.POINTS, -0.005),
        ("minimal-pairs:my.jsonl.acc >= 1", "minimal-pairs:my.jsonl.acc", True, Kind.VALUE, 1.0),
        ("kl <= 5e-3", "kl", False, Kind.VALUE, 0.005),
        ("acc >= -0%", "acc", True, Kind.RELATIVE, 0.0),
        ("nll <= -1.", "nll", False, Kind.DIFFERENCE, -1.0),
    ],
)
def test_meaning(text: str, metric: str, at_least: bool, kind: Kind, limit: float) -> None:
    rule = parse_rule(text)
    assert (rule.metric, rule.at_least, rule.kind) == (metric, at_least, kind)
    assert rule.limit == pytest.approx(limit, abs=1e-15)
    assert parse_rule(rule.text) == rule


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("", "is empty", "METRIC >= BOUND"),
        ("ppl", "no >= or <=", "METRIC >= BOUND"),
        ("ppl < +2%", "'<' is not >= or <=", "METRIC >= BOUND"),
        ("ppl == 2", "'==' is not >= or <=", "METRIC >= BOUND"),
        ("ppl =< 2", "'=<' is not >= or <=", "METRIC >= BOUND"),
        ("ppl ≤ 2", "'≤' is not >= or <=", "METRIC >= BOUND"),
        ("0.1 <= kl <= 0.2", "one comparison per rule", "write two rules"),
        (">= 1", "no metric before >=", "METRIC >= BOUND"),
        ("my task >= 1", "'my task' is not one name", "METRIC >= BOUND"),
        ("ppl <=", "no bound after <=", "METRIC >= BOUND"),
        ("ppl <= two", "'two' is not a bound", "+0.02"),
        ("ppl <= +2 percent", "'+2 percent' is not a bound", "+2%"),
        ("ppl <= 1,5", "'1,5' is not a bound", "METRIC >= BOUND"),
        ("ppl <= nan", "'nan' is not a bound", "METRIC >= BOUND"),
        ("ppl <= inf", "'inf' is not a bound", "METRIC >= BOUND"),
        ("ppl <= 1e999", "too large a number", "METRIC >= BOUND"),
        ("blimp >= 1.0pt", "needs a sign", "write +1.0pt or -1.0pt"),
        ("ppl <= 2%", "needs a sign", "write +2% or -2%"),
        ("blimp >= -101pt", "more than 100 points", "METRIC >= BOUND"),
        ("ppl <= -100%", "-100% or less", "METRIC >= BOUND"),
        ("ppl <= \N{MINUS SIGN}2%", "is not a bound", "METRIC >= BOUND"),
        ("ppl <= +\N{ARABIC-INDIC DIGIT TWO}%", "is not a bound", "METRIC >= BOUND"),
    ],
)
def test_everything_else_is_one_line(text: str, problem: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_rule(text)
    assert problem in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.exit_code == 2


def test_numbers_are_shown_as_they_are_written() -> None:
    shown = {
        "a >= -1pt": "-1.23pt",
        "a <= +2%": "-1.23%",
        "a <= +1": "-0.01235",
        "a <= 1": "-0.01235",
    }
    assert {text: parse_rule(text).show(-0.012345) for text in shown} == shown
    assert parse_rule("a >= -1pt").show(-1e-9) == "+0.00pt"
    assert parse_rule("ppl <= +0.005%").show(0.00005) == "+0.005%"


def test_a_file_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text("# what a release has to meet\n\nppl <= +2%  # per text\n  kl <= 0.05\n")
    assert [rule.text for rule in read_rules(path)] == ["ppl <= +2%", "kl <= 0.05"]
    path.write_text("ppl <= +2%\n\nkl < 0.05\n")
    with pytest.raises(RecipeError, match=r"rules.txt, line 3: rule 'kl < 0.05': '<' is not"):
        read_rules(path)
    path.write_text("# nothing\n")
    with pytest.raises(RecipeError, match="there are no rules in it"):
        read_rules(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not text"):
        read_rules(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_rules(tmp_path / "none.txt")
