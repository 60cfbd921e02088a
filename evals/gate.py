"""Judging a new evaluation against a baseline's by rules: pass, fail, or too little data to say.

A rule passes only if the whole one-sided confidence bound meets its limit, and fails only if the opposite bound breaks
it. So at a true value exactly at the limit each happens with probability `1 - confidence`, and a gate neither passes
by luck nor fails by noise more often than that. In between the data is too little: inconclusive. Several rules are
judged one by one; nothing is corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from compressor.errors import RecipeError
from compressor.evals.confidence import Confidence
from compressor.evals.gate_inputs import (
    MEASURED_AGAINST_BASELINE,
    check_comparable,
    check_mean,
    check_reference,
    resolve,
    sample_column,
)
from compressor.evals.paired import Pairs, pair
from compressor.evals.results import Evaluation
from compressor.evals.rules import Kind, Rule
from compressor.evals.scores import Model


class Verdict(Enum):
    """What a rule, or the whole gate, comes to."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Judgement:
    """One rule's outcome.

    Attributes:
        rule: The rule.
        metric: `task.metric` it was resolved to.
        verdict: Pass, fail, or inconclusive.
        baseline: The metric of the baseline; None if the rule needs none and there is none.
        value: The metric of the new model.
        measured: What the rule limits: the change, the relative change, or the value.
        lower: One-sided lower confidence bound of `measured`, or -inf.
        upper: One-sided upper bound, or inf.
        met: Confidence in 0..1 that the true value meets the limit.
        broken: Confidence that it breaks it.
        units: Number of independent units behind the bounds.
        unit: What they are: documents, segments or groups.
        note: What is special about the data, or empty.
    """

    rule: Rule
    metric: str
    verdict: Verdict
    baseline: float | None
    value: float
    measured: float
    lower: float
    upper: float
    met: float
    broken: float
    units: int
    unit: str
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data; infinite bounds become null."""
        return {
            "rule": self.rule.text,
            "metric": self.metric,
            "verdict": self.verdict.value,
            "kind": self.rule.kind.value,
            "limit": self.rule.limit,
            "measured": self.measured,
            "lower": self.lower if math.isfinite(self.lower) else None,
            "upper": self.upper if math.isfinite(self.upper) else None,
            "confidence_met": self.met,
            "confidence_broken": self.broken,
            "baseline": self.baseline,
            "value": self.value,
            "units": self.units,
            "unit": self.unit,
            "note": self.note,
        }


@dataclass(frozen=True)
class GateResult:
    """All rules' outcomes.

    Attributes:
        baseline: Model of the baseline evaluation.
        model: Model of the new one.
        confidence: Of each one-sided bound.
        strict: Whether inconclusive rules stop the gate.
        judgements: In the order of the rules.
        notes: How the two evaluations differ in what computed them.
    """

    baseline: Model
    model: Model
    confidence: float
    strict: bool
    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...]

    def count(self, verdict: Verdict) -> int:
        """Return how many rules came to this verdict."""
        return sum(judgement.verdict is verdict for judgement in self.judgements)

    @property
    def passed(self) -> bool:
        """Whether no rule failed; under `strict`, whether all passed."""
        return not self.count(Verdict.FAIL) and not (self.strict and self.count(Verdict.INCONCLUSIVE))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "passed": self.passed,
            "confidence": self.confidence,
            "strict": self.strict,
            "baseline": self.baseline.to_json(),
            "model": self.model.to_json(),
            "rules": [judgement.to_json() for judgement in self.judgements],
            "notes": list(self.notes),
        }


def gate(
    baseline: Evaluation,
    new: Evaluation,
    rules: Iterable[Rule],
    *,
    confidence: float = 0.95,
    strict: bool = False,
    by_group: bool = False,
) -> GateResult:
    """Judge every rule.

    Args:
        baseline: Evaluation of the model that is compared with.
        new: Evaluation of the model that is judged.
        rules: At least one.
        confidence: Of each one-sided bound, above 0.5 and below 1.
        strict: Whether inconclusive rules stop the gate.
        by_group: Take groups (subtasks) instead of documents as independent units.

    Raises:
        RecipeError: No rules, a confidence out of range, a task, metric or document that is not there, evaluations
            that cannot be compared, or a rule that makes no sense for its metric.
    """
    if not 0.5 < confidence < 1:
        raise RecipeError(
            f"a confidence of {confidence:g} is not between 0.5 and 1", "use 0.95, or 0.99 to be stricter"
        )
    judgements = []
    for rule in rules:
        try:
            judgements.append(_judge(rule, baseline, new, confidence, by_group))
        except RecipeError as error:
            raise RecipeError(f"rule {rule.text!r}: {error.message}", error.hint) from error
    if not judgements:
        raise RecipeError("there are no rules to judge by", "for example --rule 'ppl <= +2%'")
    return GateResult(baseline.model, new.model, confidence, strict, tuple(judgements), _notes(baseline, new))


def _judge(rule: Rule, baseline: Evaluation, new: Evaluation, level: float, by_group: bool) -> Judgement:
    task, metric = resolve(rule.metric, new.tasks)
    ours, theirs = new.tasks[task], baseline.tasks.get(task)
    if task in MEASURED_AGAINST_BASELINE:
        check_reference(baseline, new)
    if theirs is not None and metric not in theirs.metrics:
        theirs = None
    if rule.kind is not Kind.VALUE:
        if theirs is None:
            raise RecipeError(
                f"the baseline's evaluation has no {task}.{metric}, so there is no change to limit",
                "limit the new value, or evaluate the baseline with the same tasks",
            )
        check_comparable(task, theirs, ours, (baseline.seed, new.seed))
    column = sample_column(task, metric, ours)
    before = ours if rule.kind is Kind.VALUE or theirs is None else theirs
    pairs = pair(before.samples, ours.samples, column, by_group=by_group)
    exponential = column != metric
    for side, result in ((pairs.old, before), (pairs.new, ours)):
        check_mean(task, metric, result, float(side.sum() / pairs.weight.sum()), exponential)
    _check_kind(rule, f"{task}.{metric}", pairs.share and not exponential)
    curve = _curve(rule, pairs, exponential)
    above, below = curve.above(rule.limit), curve.below(rule.limit)
    met, broken = (above, below) if rule.at_least else (below, above)
    verdict = Verdict.PASS if met >= level else Verdict.FAIL if broken >= level else Verdict.INCONCLUSIVE
    return Judgement(
        rule=rule,
        metric=f"{task}.{metric}",
        verdict=verdict,
        baseline=None if theirs is None else theirs.metrics[metric].value,
        value=ours.metrics[metric].value,
        measured=curve.value,
        lower=curve.lower(level),
        upper=curve.upper(level),
        met=met,
        broken=broken,
        units=curve.units,
        unit=pairs.unit,
        note=curve.note,
    )


def _curve(rule: Rule, pairs: Pairs, exponential: bool) -> Confidence:
    """Return the confidence in what the rule limits, on the rule's scale."""
    if rule.kind is Kind.VALUE:
        return pairs.exp_value() if exponential else pairs.value()
    if rule.kind is Kind.RELATIVE:
        ratio = pairs.exp_ratio() if exponential else pairs.ratio()
        return ratio.through(lambda value: value - 1, lambda limit: limit + 1)
    return pairs.exp_difference() if exponential else pairs.difference()


def _check_kind(rule: Rule, name: str, share: bool) -> None:
    if rule.kind is Kind.POINTS and not share:
        raise RecipeError(f"{name} is not between 0 and 1, it has no points", "write a relative change, such as +2%")
    if rule.kind is Kind.VALUE and share and rule.limit > 1:
        raise RecipeError(f"{name} is between 0 and 1", f"write {rule.limit / 100:g} for {rule.limit:g} %")


def _notes(baseline: Evaluation, new: Evaluation) -> tuple[str, ...]:
    """Name what computed the two evaluations differently, which may move results a little."""
    old, now = ({"dtype": e.model.dtype, **e.versions} for e in (baseline, new))
    shared = sorted(old.keys() & now.keys())
    return tuple(f"{name}: {old[name]} for the baseline, {now[name]} here" for name in shared if old[name] != now[name])
