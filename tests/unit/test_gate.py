"""Judging rules: names, verdicts, what may be compared with what, and the reports for other programs."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from compressor.errors import RecipeError
from compressor.evals.gate import GateResult, Judgement, Verdict, gate
from compressor.evals.gate_inputs import resolve
from compressor.evals.gate_report import headline, junit, markdown
from compressor.evals.results import Evaluation
from compressor.evals.rules import parse_rule
from compressor.evals.scores import Estimate, TaskResult
from compressor.testing.evaluations import document_task, evaluation, kl_task, perplexity_task

BLIMP = "minimal-pairs:blimp-a"


def tasks(seed: int, log_ratio: float = 0.0, wrong: int = 0, kl: float | None = None) -> dict[str, TaskResult]:
    """Return the tasks of one model; `log_ratio`, `wrong` and `kl` say how it differs from the baseline."""
    rng = np.random.default_rng(seed)
    base, noise = rng.normal(3.2, 0.4, 64), rng.normal(0, 0.01, 64)
    right = (rng.random(670) < 0.8).astype(float)
    right[np.flatnonzero(right)[:wrong]] = 0
    out = {
        "perplexity": perplexity_task(base + (log_ratio + noise - noise.mean() if log_ratio else 0)),
        BLIMP: document_task([f"uid{i // 10}" for i in range(670)], acc=right),
        "arc": document_task(acc=right[:200], acc_norm=1 - right[:200]),
    }
    return out if kl is None else {**out, "kl": kl_task(kl * rng.gamma(6, 1 / 6, 64))}


def original() -> Evaluation:
    return evaluation("original", tasks(1))


def compressed(log_ratio: float = 0.01, wrong: int = 3, kl: float = 0.04) -> Evaluation:
    return evaluation("compressed", tasks(1, log_ratio, wrong, kl), baseline="original")


def judge(*rules: str, base: Evaluation | None = None, new: Evaluation | None = None, **options: object) -> GateResult:
    return gate(base or original(), new or compressed(), [parse_rule(rule) for rule in rules], **options)


def one(rule: str, **options: object) -> Judgement:
    return judge(rule, **options).judgements[0]


def error(rule: str, **options: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        judge(rule, **options)
    assert caught.value.message.startswith(f"rule {rule!r}: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ppl", ("perplexity", "perplexity")),
        ("ppl.nll", ("perplexity", "nll")),
        ("perplexity", ("perplexity", "perplexity")),
        ("nll", ("perplexity", "nll")),
        ("kl", ("kl", "kl")),
        ("kl.kl_p99", ("kl", "kl_p99")),
        ("agreement", ("kl", "agreement")),
        ("blimp", (BLIMP, "acc")),
        ("blimp.acc", (BLIMP, "acc")),
        ("minimal-pairs", (BLIMP, "acc")),
        (BLIMP, (BLIMP, "acc")),
        ("arc.acc_norm", ("arc", "acc_norm")),
    ],
)
def test_names(name: str, found: tuple[str, str]) -> None:
    assert resolve(name, compressed().tasks) == found


def test_names_with_dots_and_tasks_called_like_an_alias() -> None:
    made = document_task(acc=[1, 0])
    found = {"pairs:my.file.jsonl": made, "blimp": made, "minimal-pairs": made, "minimal-pairs:blimp-b": made}
    assert resolve("pairs:my.file.jsonl.acc", found) == ("pairs:my.file.jsonl", "acc")
    assert resolve("pairs", found) == ("pairs:my.file.jsonl", "acc")
    assert resolve("my", found) == ("pairs:my.file.jsonl", "acc")
    assert resolve("blimp", found) == ("blimp", "acc")
    assert resolve("blimp-b.acc", found) == ("minimal-pairs:blimp-b", "acc")
    assert resolve("minimal-pairs", found) == ("minimal-pairs", "acc")
    for name in (".", "blimp.", ".acc", "min", "pairs:"):
        with pytest.raises(RecipeError, match="has no task"):
            resolve(name, found)


def test_names_that_mean_nothing_or_too_much() -> None:
    assert "no task 'hellaswag'" in error("hellaswag >= -1pt").message
    assert "arc, kl, minimal-pairs:blimp-a, perplexity" in error("hellaswag >= -1pt").hint
    assert "task 'kl' has no metric 'p99'" in error("kl.p99 <= 1").message
    assert "task 'arc' has 2 metrics" in error("arc >= -1pt").message
    assert error("arc >= -1pt").hint == "write arc.acc or arc.acc_norm"
    made = compressed()
    made = dataclasses.replace(made, tasks={**made.tasks, "minimal-pairs:blimp-b": made.tasks[BLIMP]})
    assert "could be minimal-pairs:blimp-a or minimal-pairs:blimp-b" in error("blimp >= -1pt", new=made).message


@pytest.mark.parametrize(
    ("rule", "verdict", "measured"),
    [
        ("ppl <= +2%", Verdict.PASS, math.expm1(0.01)),
        ("ppl <= +0.5%", Verdict.FAIL, math.expm1(0.01)),
        ("ppl <= +1%", Verdict.INCONCLUSIVE, math.expm1(0.01)),
        ("ppl >= +0.5%", Verdict.PASS, math.expm1(0.01)),
        ("nll <= +0.013", Verdict.PASS, 0.01),
        ("nll <= +1%", Verdict.PASS, None),
        ("ppl <= +1", Verdict.PASS, None),
        ("ppl <= +0.1", Verdict.FAIL, None),
        ("ppl <= 100", Verdict.PASS, None),
        ("ppl <= 10", Verdict.FAIL, None),
        ("kl <= 0.05", Verdict.PASS, None),
        ("kl <= 0.03", Verdict.FAIL, None),
        ("agreement >= 0.4", Verdict.PASS, 0.5),
        ("blimp >= -2pt", Verdict.PASS, -3 / 670),
        ("blimp >= -1pt", Verdict.INCONCLUSIVE, -3 / 670),
        ("blimp >= -0.01", Verdict.INCONCLUSIVE, -3 / 670),
        ("blimp >= +0pt", Verdict.FAIL, -3 / 670),
        ("blimp >= -2%", Verdict.PASS, None),
        ("blimp >= 0.7", Verdict.PASS, None),
        ("blimp <= 0.7", Verdict.FAIL, None),
    ],
)
def test_verdicts(rule: str, verdict: Verdict, measured: float | None) -> None:
    got = one(rule)
    assert got.verdict is verdict
    if measured is not None:
        assert got.measured == pytest.approx(measured, abs=1e-9)
    assert got.lower <= got.measured <= got.upper
    inside = got.lower < got.rule.limit < got.upper  # the same answer, read off the interval
    assert inside == (verdict is Verdict.INCONCLUSIVE)


def test_relative_and_absolute_numbers_are_those_of_the_files() -> None:
    base, new = original(), compressed()
    before, after = (e.tasks["perplexity"].metrics["perplexity"].value for e in (base, new))
    got = one("ppl <= +2%")
    assert (got.baseline, got.value, got.units, got.unit) == (before, after, 64, "segments")
    assert got.measured == pytest.approx(after / before - 1, rel=1e-9)
    assert one("ppl <= +2").measured == pytest.approx(after - before, rel=1e-9)
    assert one("ppl <= 20").measured == pytest.approx(after, rel=1e-12)
    before, after = (e.tasks[BLIMP].metrics["acc"].value for e in (base, new))
    assert one("blimp >= -1%").measured == pytest.approx(after / before - 1, rel=1e-9)
    assert (one("blimp >= -1pt").units, one("blimp >= -1pt").unit) == (670, "documents")
    assert one("kl <= 0.1").baseline is None


def test_more_confidence_widens_and_decides_less() -> None:
    assert one("blimp >= -1.2pt").verdict is Verdict.PASS
    assert one("blimp >= -1.2pt", confidence=0.99).verdict is Verdict.INCONCLUSIVE
    assert one("ppl <= +2%", confidence=0.99).upper > one("ppl <= +2%", confidence=0.9).upper
    for bad in (0.5, 1.0, 95.0, -1.0, math.nan):
        with pytest.raises(RecipeError, match=r"is not between 0\.5 and 1"):
            judge("ppl <= +2%", confidence=bad)


def test_groups_as_units() -> None:
    got = one("blimp >= -1pt", by_group=True)
    assert (got.units, got.unit) == (67, "groups")
    assert got.measured == one("blimp >= -1pt").measured
    assert one("ppl <= +2%", by_group=True).unit == "segments"


def test_three_identical_documents_prove_nothing() -> None:
    same = evaluation("m", {"qa": document_task(acc=[1, 0, 1])})
    got = one("qa >= -1pt", base=same, new=same)
    assert (got.verdict, got.measured) == (Verdict.INCONCLUSIVE, 0)
    assert got.lower == pytest.approx(0.05 ** (1 / 3) - 1)
    text = evaluation("m", {"perplexity": perplexity_task([3.0, 3.1, 3.2])})
    got = one("ppl <= +2%", base=text, new=text)
    assert (got.verdict, got.lower) == (Verdict.INCONCLUSIVE, -math.inf)
    assert got.to_json()["lower"] is None
    assert "3 independent units" in got.note


def test_a_gate_needs_rules() -> None:
    with pytest.raises(RecipeError, match="no rules to judge by"):
        judge()


def test_strictness() -> None:
    rules = ("ppl <= +2%", "blimp >= -1pt")
    assert judge(*rules).passed
    assert not judge(*rules, strict=True).passed
    assert judge("ppl <= +2%", strict=True).passed
    assert not judge(*rules, "kl <= 0.03").passed
    assert headline(judge(*rules)) == "gate passed: 1 pass, 1 inconclusive"
    assert headline(judge(*rules, strict=True)) == "gate failed (strict): 1 pass, 1 inconclusive"


def changed(e: Evaluation, task: str, **change: object) -> Evaluation:
    return dataclasses.replace(e, tasks={**e.tasks, task: dataclasses.replace(e.tasks[task], **change)})


def settings(e: Evaluation, task: str, **change: object) -> Evaluation:
    return changed(e, task, settings={**e.tasks[task].settings, **change})


def test_evaluations_that_were_asked_something_else() -> None:
    rule, new = "blimp >= -1pt", compressed()
    assert "version 2 for the baseline and 1" in error(rule, base=changed(original(), BLIMP, version="2")).message
    assert "num_fewshot 5 for the" in error(rule, base=settings(original(), BLIMP, num_fewshot=5)).message
    assert "limit None for the baseline and 10" in error(rule, new=settings(new, BLIMP, limit=10)).message
    assert "text_sha256" in error("ppl <= +2%", new=settings(new, "perplexity", text_sha256="1" * 64)).message
    assert one("ppl <= +2%", new=settings(new, "perplexity", text="copy.txt")).verdict is Verdict.PASS
    few = {"base": settings(original(), "arc", num_fewshot=5), "new": settings(new, "arc", num_fewshot=5)}
    assert one("arc.acc >= -10pt", **few).verdict is Verdict.PASS
    few["new"] = dataclasses.replace(few["new"], seed=7)
    assert "seed 0 for the baseline and 7" in error("arc.acc >= -10pt", **few).message
    assert one(rule, new=dataclasses.replace(new, seed=7)).verdict is Verdict.INCONCLUSIVE


def test_documents_that_are_not_the_same() -> None:
    made = document_task([f"uid{i // 10}" for i in range(660)], acc=np.ones(660))
    few = dataclasses.replace(compressed(), tasks={**compressed().tasks, BLIMP: made})
    assert "not the same documents: 10 of 670 are missing" in error("blimp >= -1pt", new=few).message
    assert one("blimp >= 0.5", new=few).verdict is Verdict.PASS  # needs no pairs
    other = dataclasses.replace(original().tasks[BLIMP].samples, hash=("f",) * 670)
    found = error("blimp >= -1pt", base=changed(original(), BLIMP, samples=other))
    assert "another hash for 670 of 670" in found.message


def test_a_task_only_the_new_evaluation_has() -> None:
    alone = dataclasses.replace(original(), tasks={})
    assert "no minimal-pairs:blimp-a.acc" in error("blimp >= -1pt", base=alone).message
    assert one("blimp >= 0.7", base=alone).verdict is Verdict.PASS
    assert "no kl.kl, so there is no change" in error("kl <= +0.01").message


def test_divergences_need_the_same_original() -> None:
    new = compressed()
    stranger = dataclasses.replace(new, baseline=evaluation("other", {}).model)
    assert "was measured against other, not against original" in error("kl <= 0.05", new=stranger).message
    assert "against nothing" in error("agreement >= 0.4", new=dataclasses.replace(new, baseline=None)).message
    # Two compressed models of one original: the older is the baseline of the gate.
    older = evaluation("older", tasks(1, 0.01, 3, 0.05), baseline="original")
    assert one("kl <= +0%", base=older).verdict is Verdict.PASS
    assert one("kl <= +0.001", base=older).measured == pytest.approx(-0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("ppl <= +1pt", "perplexity.perplexity is not between 0 and 1"),
        ("kl <= +1pt", "is not between 0 and 1"),
        ("blimp >= 80", "minimal-pairs:blimp-a.acc is between 0 and 1"),
        ("kl.kl_p99 <= 1", "kl.kl_p99 is kept without samples"),
    ],
)
def test_rules_that_make_no_sense_for_their_metric(rule: str, words: str) -> None:
    older = evaluation("older", tasks(1, 0.01, 3, 0.05), baseline="original")
    assert words in error(rule, base=older).message


def test_relative_change_of_zero() -> None:
    zero = evaluation("m", {"qa": document_task(acc=[0, 0, 0])})
    assert "a baseline above zero, which is 0" in error("qa >= -1%", base=zero, new=zero).message


def test_a_metric_that_is_no_mean_of_its_samples() -> None:
    made = changed(compressed(), BLIMP, metrics={"acc": Estimate(0.5, 0.01)})
    assert "it is no mean over documents" in error("blimp >= -1pt", new=made).message
    made = changed(original(), BLIMP, metrics={"acc": Estimate(0.5, 0.01)})
    assert "is 0.5, but its samples give" in error("blimp >= -1pt", base=made).message


def test_what_computed_them_differently_is_noted() -> None:
    new = dataclasses.replace(compressed(), versions={"compressor": "1", "lm_eval": "0.4"})
    assert judge("kl <= 0.05", new=new).notes == ("compressor: 0 for the baseline, 1 here",)
    assert judge("kl <= 0.05").notes == ()


RULES = ("ppl <= +2%", "kl <= 0.03", "blimp >= -1pt")


@pytest.mark.parametrize("strict", [False, True])
def test_junit(strict: bool) -> None:
    root = ET.fromstring(junit(judge(*RULES, strict=strict)))
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert suite is not None
    for element in (root, suite):
        counts = {name: element.get(name) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {"tests": "3", "failures": "21"[not strict], "errors": "0", "skipped": "01"[not strict]}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == list(RULES)
    assert [case.get("classname") for case in cases][2] == "gate.minimal-pairs:blimp-a.acc"
    found = [[child.tag for child in case] for case in cases]
    assert found == [["system-out"], ["failure"], ["failure" if strict else "skipped"]]
    failure = cases[1].find("failure")
    assert failure is not None
    assert "kl.kl: measured 0.0" in str(failure.get("message"))
    assert "from 64 segments" in str(failure.get("message"))


def test_junit_survives_strange_names() -> None:
    base = dataclasses.replace(original(), model=dataclasses.replace(original().model, name='a<b>&"\x00\x1b'))
    root = ET.fromstring(junit(judge("ppl <= +2%", base=base)))
    assert [p.get("value") for p in root.iter("property") if p.get("name") == "baseline"] == ['a<b>&"']


def test_markdown() -> None:
    new = dataclasses.replace(compressed(), model=dataclasses.replace(compressed().model, name="x|y"))
    lines = markdown(judge(*RULES, new=new)).splitlines()
    assert lines[0] == "### gate failed: 1 pass, 1 fail, 1 inconclusive"
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 3
    assert "| `ppl <= +2%` | +1.01% |" in rows[0]
    assert "| **fail** | 64 segments |" in rows[1]
    assert "**inconclusive**" in rows[2]
    few = evaluation("m", {"perplexity": perplexity_task([3.0, 3.1])})
    text = markdown(judge("ppl <= +2%", base=few, new=few))
    assert "| - to - |" in text
    assert "- perplexity.perplexity: 2 independent units" in text


def test_json_is_plain() -> None:
    data = judge(*RULES).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [rule["verdict"] for rule in data["rules"]] == ["pass", "fail", "inconclusive"]
    assert data["passed"] is False
    assert data["rules"][0]["confidence_met"] > 0.95
    assert data["rules"][1]["confidence_broken"] > 0.95
