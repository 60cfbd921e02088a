"""The rules of a gate: `METRIC >= BOUND` or `METRIC <= BOUND`, each one limit on one metric.

The way the bound is written says what is limited: `-1.0pt` and `+0.02` the change from the baseline (in percentage
points of a metric between 0 and 1, or in the metric's own unit), `+2%` the relative change, `0.05` the new value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from compressor.errors import CheckpointError, RecipeError

GRAMMAR = (
    "METRIC >= BOUND or METRIC <= BOUND, where METRIC is TASK or TASK.METRIC and BOUND is a change such as -1.0pt, +2% "
    "or +0.02, or a new value such as 0.05"
)

_NUMBER = re.compile(r"([+-]?)((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(pt|%|)", re.ASCII)
_OPERATOR = re.compile(r"[<>=!~≤≥]+")


class Kind(Enum):
    """What a rule limits."""

    POINTS = "points"
    RELATIVE = "relative"
    DIFFERENCE = "difference"
    VALUE = "value"


@dataclass(frozen=True)
class Rule:
    """One limit.

    Attributes:
        text: As the user wrote it, with single spaces.
        metric: Task, `task.metric` or alias, not resolved yet.
        at_least: True for `>=`, False for `<=`.
        kind: What is limited.
        limit: As a plain number: -0.01 for `-1pt`, 0.02 for `+2%`.
    """

    text: str
    metric: str
    at_least: bool
    kind: Kind
    limit: float

    def show(self, number: float) -> str:
        """Write a number of this rule's kind as rules do."""
        if self.kind in (Kind.POINTS, Kind.RELATIVE):
            shown = 100 * number
            digits = f"{shown:+.3g}" if 1e-4 <= abs(shown) < 0.01 else f"{round(shown, 2) + 0.0:+.2f}"  # no minus zero
            return f"{digits}{'pt' if self.kind is Kind.POINTS else '%'}"
        return f"{number + 0.0:+.4g}" if self.kind is Kind.DIFFERENCE else f"{number:.4g}"


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Raises:
        RecipeError: Anything the grammar does not know; the message says what.
    """
    shown = " ".join(text.split())

    def fail(problem: str, hint: str = GRAMMAR) -> RecipeError:
        return RecipeError(f"rule {shown!r}: {problem}", hint)

    operators = list(_OPERATOR.finditer(shown))
    if not shown:
        raise fail("is empty")
    if not operators:
        raise fail("there is no >= or <= in it")
    if len(operators) > 1:
        raise fail("one comparison per rule", "write two rules, one for each limit")
    operator = operators[0].group()
    metric, bound = shown[: operators[0].start()].strip(), shown[operators[0].end() :].strip()
    if operator not in (">=", "<="):
        raise fail(f"{operator!r} is not >= or <=")
    if not metric:
        raise fail(f"there is no metric before {operator}")
    if " " in metric:
        raise fail(f"{metric!r} is not one name")
    number = _NUMBER.fullmatch(bound)
    if number is None:
        raise fail(f"{bound!r} is not a bound" if bound else f"there is no bound after {operator}")
    sign, digits, unit = number.groups()
    limit = float(f"{sign}{digits}")
    if limit in (float("inf"), float("-inf")):
        raise fail(f"{bound!r} is too large a number")
    if unit and not sign:
        raise fail(
            f"{bound!r} is a change and needs a sign",
            f"write +{bound} or -{bound}, or {limit / 100:g} for the value itself",
        )
    if unit == "pt" and abs(limit) > 100:
        raise fail("no metric between 0 and 1 changes by more than 100 points")
    if unit == "%" and limit <= -100:
        raise fail("no relative change is -100% or less")
    kind = {"pt": Kind.POINTS, "%": Kind.RELATIVE}.get(unit, Kind.DIFFERENCE if sign else Kind.VALUE)
    scale = 100 if unit else 1
    return Rule(f"{metric} {operator} {bound}", metric, operator == ">=", kind, limit / scale)


def read_rules(path: Path) -> list[Rule]:
    """Read a file with one rule per line; empty lines and what follows a `#` are left out.

    Raises:
        CheckpointError: The file cannot be read.
        RecipeError: A line is no rule, with its number; or there is none at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise CheckpointError(f"{path}: cannot be read: {reason}", "give a text file with one rule per line") from error
    rules = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                rules.append(parse_rule(text))
            except RecipeError as error:
                raise RecipeError(f"{path}, line {number}: {error.message}", error.hint) from error
    if not rules:
        raise RecipeError(f"{path}: there are no rules in it", GRAMMAR)
    return rules
