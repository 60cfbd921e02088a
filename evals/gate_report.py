"""A gate's outcome for other programs: Markdown for a pull request or job summary, JUnit XML for test dashboards."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from compressor.evals.gate import GateResult, Judgement, Verdict

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def headline(result: GateResult) -> str:
    """Return the outcome in one line."""
    counts = [f"{result.count(verdict)} {verdict.value}" for verdict in Verdict if result.count(verdict)]
    strict = " (strict)" if result.strict else ""
    return f"gate {'passed' if result.passed else 'failed'}{strict}: {', '.join(counts)}"


def interval(judgement: Judgement) -> str:
    """Return both one-sided bounds as rules write numbers; an end that nothing is known about is a dash."""
    ends = (judgement.lower, judgement.upper)
    shown = [judgement.rule.show(end) if math.isfinite(end) else "-" for end in ends]
    return f"{shown[0]} to {shown[1]}"


def sentence(judgement: Judgement) -> str:
    """Return one judgement in words."""
    note = f"; {judgement.note}" if judgement.note else ""
    return (
        f"{judgement.metric}: measured {judgement.rule.show(judgement.measured)}, bounds {interval(judgement)} from "
        f"{judgement.units} {judgement.unit}, the rule holds with confidence {judgement.met:.1%}{note}"
    )


def markdown(result: GateResult) -> str:
    """Return a Markdown section with one table row per rule."""
    lines = [
        f"### {_cell(headline(result))}",
        "",
        f"`{result.model.name}` against `{result.baseline.name}`; bounds are one-sided, {result.confidence:.4g} each.",
        "",
        "| rule | measured | bounds | verdict | n |",
        "|---|---|---|---|---|",
    ]
    for judgement in result.judgements:
        verdict = judgement.verdict.value
        cells = (
            f"`{judgement.rule.text}`",
            judgement.rule.show(judgement.measured),
            interval(judgement),
            verdict if judgement.verdict is Verdict.PASS else f"**{verdict}**",
            f"{judgement.units} {judgement.unit}",
        )
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    remarks = [f"{judgement.metric}: {judgement.note}" for judgement in result.judgements if judgement.note]
    lines += ["", *(f"- {remark}" for remark in (*remarks, *result.notes))] if remarks or result.notes else []
    return "\n".join(lines) + "\n"


def junit(result: GateResult) -> str:
    """Return JUnit XML with one test case per rule.

    A failed rule is a failure; an inconclusive one is skipped, or a failure of a strict gate.
    """
    failed = result.count(Verdict.FAIL) + (result.count(Verdict.INCONCLUSIVE) if result.strict else 0)
    skipped = 0 if result.strict else result.count(Verdict.INCONCLUSIVE)
    counts = {"tests": len(result.judgements), "failures": failed, "errors": 0, "skipped": skipped}
    root = ET.Element("testsuites", {name: str(count) for name, count in counts.items()})
    attributes = {"name": "compress gate", **{name: str(count) for name, count in counts.items()}}
    suite = ET.SubElement(root, "testsuite", attributes)
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("baseline", result.baseline.name),
        ("model", result.model.name),
        ("confidence", f"{result.confidence:g}"),
    ):
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for judgement in result.judgements:
        names = {"classname": _clean(f"gate.{judgement.metric}"), "name": _clean(judgement.rule.text)}
        case = ET.SubElement(suite, "testcase", names)
        text = _clean(sentence(judgement))
        if judgement.verdict is Verdict.PASS:
            ET.SubElement(case, "system-out").text = text
            continue
        failure = judgement.verdict is Verdict.FAIL or result.strict
        tag, kind = ("failure", {"type": judgement.verdict.value}) if failure else ("skipped", {})
        ET.SubElement(case, tag, {"message": text, **kind})
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _clean(text: str) -> str:
    """Drop characters that XML cannot hold."""
    return _NOT_XML.sub("", text)
