"""Bits against divergence, and the calibration study: page, picture and tables of results agree."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from compressor.evals.bench.row import Preset, Row, TextFile
from compressor.evals.bench.table import TABLES, read_table
from compressor.pages.assemble import ROOT, marked
from compressor.pages.measured import APART, Measured, measured_rows, page_rows
from compressor.pages.pareto import PICTURE, mark_of, pareto_page, pareto_rows, pareto_svg
from compressor.pages.plot import BREAK, Mark, draw, frontier
from compressor.pages.study import NOT_RUN, column_of, set_of, study_page

DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def quoted() -> list[Measured]:
    """The rows that the committed page lists, as the tables have them now."""
    known = {one.name: one for one in pareto_rows()}
    text = (DOCS / "pareto.md").read_text(encoding="utf-8").split("## All rows", 1)[1]
    return [known[name] for name in re.findall(r"^\| ([^|]+?) \| [\d.]+ \|", text, re.MULTILINE)]


def test_page_and_picture_are_those_of_the_rows_they_name() -> None:
    # Rows that were made since may be missing; what is quoted must be what the tables say now.
    hint = "run: python -m compressor.pages"
    rows = quoted()
    assert len(rows) >= 40
    assert (DOCS / "pareto.md").read_text(encoding="utf-8") == marked(pareto_page(rows), DOCS / "pareto.md"), hint
    assert (DOCS / PICTURE).read_text(encoding="utf-8") == pareto_svg(rows), hint


def test_rows_are_weight_only_and_of_one_model() -> None:
    rows = pareto_rows()
    assert {one.model for one in rows} == {"smollm2-135m"}
    assert not [one.name for one in rows if one.row.inputs or one.row.prune or one.row.attention]
    left_out = [one.name for one in measured_rows() if one.row.inputs and one.model == "smollm2-135m"]
    assert left_out


def test_the_picture_has_a_mark_for_every_row_inside_its_frame() -> None:
    rows = pareto_rows()
    root = ElementTree.fromstring(pareto_svg(rows))
    titles = [group.find(f"{SVG}title") for group in root.iter(f"{SVG}g")]
    names = sorted(str(title.text).rsplit(": ", 1)[0] for title in titles if title is not None)
    assert names == sorted(one.name for one in rows)
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        for key, limit in (("cx", width), ("x", width), ("cy", height), ("y", height)):
            assert 0 <= float(element.get(key, 0)) <= limit, element.attrib


def test_names_of_the_frontier_do_not_cover_each_other() -> None:
    root = ElementTree.fromstring(pareto_svg(pareto_rows()))
    best = {mark.name for mark in frontier([mark_of(one) for one in pareto_rows()])}
    heights = sorted(float(text.attrib["y"]) for text in root.iter(f"{SVG}text") if text.text in best)
    assert len(heights) == len(best) > 3
    assert min(b - a for a, b in itertools.pairwise(heights)) > 12


def test_the_frontier() -> None:
    marks = [
        Mark("a", 4.0, 0.5, "s", "circle"),
        Mark("b", 4.0, 0.4, "s", "circle"),
        Mark("c", 4.5, 0.4, "s", "circle"),
        Mark("d", 5.0, 0.1, "s", "square", hollow=True),
        Mark("e", 8.0, 0.2, "s", "diamond"),
    ]
    assert [mark.name for mark in frontier(marks)] == ["b", "d"]
    svg = draw(marks, {"s": "#123456"}, "a < b", {"circle": "round"}, "others")
    root = ElementTree.fromstring(svg)
    title, described = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert described is not None
    assert title.text == "a < b"
    assert "b: 4 bits, KL 0.4; d: 5 bits, KL 0.1" in str(described.text)
    across = {
        str(group[0].text)[0]: float(group[1].attrib["cx"]) for group in root.iter(f"{SVG}g") if "cx" in group[1].attrib
    }
    assert across["a"] == across["b"] < across["c"]
    places = [
        tuple(float(v) for v in pair.split(",")) for pair in root.findall(f"{SVG}polyline")[0].attrib["points"].split()
    ]
    assert places[0][0] == pytest.approx(across["b"], abs=0.1)
    assert places[1][0] > across["c"]
    assert places[1][1] > places[0][1], "less divergence is further down"
    assert BREAK > 0


def test_marks_that_would_cover_each_other_stand_side_by_side() -> None:
    marks = [Mark(f"m{k}", 4.0, 0.5, "s", "circle") for k in range(4)] + [Mark("far", 6.0, 0.01, "s", "circle")]
    root = ElementTree.fromstring(draw(marks, {"s": "#123456"}, "t", {}, ""))
    across = sorted(float(group[1].attrib["cx"]) for group in root.iter(f"{SVG}g"))[:4]
    assert min(b - a for a, b in itertools.pairwise(across)) > 9


def test_the_study_page_quotes_its_table() -> None:
    committed = (DOCS / "calibration.md").read_text(encoding="utf-8").splitlines()
    made = marked(study_page(), DOCS / "calibration.md").splitlines()
    assert len(committed) == len(made), "run: python -m compressor.pages"
    for old, new in zip(committed, made, strict=True):
        pairs = zip(old.split("|"), new.split("|"), strict=True)
        wrong = [(a, b) for a, b in pairs if a != b and a.strip() != NOT_RUN]
        assert not wrong, "run: python -m compressor.pages"
    table = read_table(TABLES / "calibration.yaml")
    kl = {row["row"]: row["KL"] for row in page_rows(TABLES / "calibration.md")}
    for row in table.rows[1:]:
        cells = next(line for line in made if line.startswith(f"| {set_of(row, table)} |")).split(" | ")
        head = next(line for line in made if line.startswith("| calibration set |")).split(" | ")
        shown = cells[head.index(column_of(row)) if column_of(row) in head else -1].strip(" |")
        assert shown == (NOT_RUN if kl[row.name] == "-" else kl[row.name]), row.name


def test_the_study_is_no_evidence_for_methods() -> None:
    assert APART == ("calibration",)
    assert not [one.name for one in measured_rows() if one.table == "calibration"]


def test_calibration_sets_in_words() -> None:
    table = read_table(TABLES / "calibration.yaml")
    text = TextFile(file="a.txt", sha256="0" * 64, part=(0.75, 1.0))
    row = Row(name="r", method="gptq", format="int4", options={"effort": "fast"}, text=text, samples=3, seq_len=7)
    assert set_of(row, table) == "3 x 7 tokens, `a.txt`, its last 25%"
    assert column_of(row) == "`gptq` effort=fast, int4"
    own = Row(name="r", method="gptq", format="int4", text=Preset(preset="self"))
    assert set_of(own, table) == "16 x 512 tokens, `self`"
