"""Table rows that prune: what they ask for, the commands, continuing a search, and the picture of searches."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from pydantic import ValidationError

from compressor.errors import RecipeError
from compressor.evals.bench.pruning import Prune, found_state, joined, keep_state
from compressor.evals.bench.quality_time import Line, draw, find_lines
from compressor.evals.bench.record import Record
from compressor.evals.bench.render import render_table
from compressor.evals.bench.steps import Cost
from compressor.evals.bench.table import TABLES, Table, read_table

HEAD = f"""
title: T
model: smollm2-135m
calibration: {{file: a.txt, sha256: "{"0" * 64}", samples: 4, seq_len: 64}}
evaluation: {{file: b.txt, sha256: "{"1" * 64}", tokens: 64, context: 32}}
rows:
"""


def table(tmp_path: Path, rows: str) -> Table:
    path = tmp_path / "t.yaml"
    path.write_text(HEAD + rows)
    return read_table(path)


SEARCH = """
  - {name: two, prune: {method: icbs, sparsity: 0.5, options: {sweeps: 2}}}
  - {name: six, prune: {method: icbs, sparsity: 0.5, options: {sweeps: 6}, after: two}}
  - {name: both, prune: {method: wanda, pattern: "2:4"}, method: gptq, format: int4, group_size: 64}
"""


def test_rows_prune_or_prune_and_round(tmp_path: Path) -> None:
    rows = {row.name: row for row in table(tmp_path, SEARCH).rows}
    assert rows["two"].prune is not None
    assert rows["two"].prune.arguments() == ["--method", "icbs", "--sparsity", "0.5", "--option", "sweeps=2"]
    assert rows["six"].prune is not None
    assert rows["six"].prune.arguments(Path("x.state"), 2)[-4:] == [
        *("--option", "sweeps=4"),
        *("--option", "start=x.state"),
    ]
    assert rows["both"].method == "gptq"
    assert rows["both"].prune is not None
    assert rows["both"].prune.arguments() == ["--method", "wanda", "--pattern", "2:4"]


def test_one_amount_of_three() -> None:
    assert Prune(method="optin", macs=0.7).arguments() == ["--method", "optin", "--macs", "0.7"]
    for wrong in ({}, {"macs": 0.7, "sparsity": 0.3}, {"pattern": "2:4", "sparsity": 0.5}):
        with pytest.raises(ValidationError, match="either a sparsity"):
            Prune(method="optin", **wrong)  # type: ignore[arg-type]


def test_a_continued_row_is_the_same_row(tmp_path: Path) -> None:
    """The result does not depend on whether the masks of another row were at hand, so neither does the digest."""
    found = table(tmp_path, SEARCH)
    (six,) = [row for row in found.rows if row.name == "six"]
    assert six.prune is not None
    alone = six.model_copy(update={"prune": six.prune.model_copy(update={"after": None})})
    assert found.digest(six) == found.digest(alone)
    (two,) = [row for row in found.rows if row.name == "two"]
    assert found.digest(six) != found.digest(two)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{name: a, prune: {method: wanda}}", "either"),
        ("{name: a, prune: {method: wanda, sparsity: 0.5, pattern: '2:4'}}", "either"),
        ("{name: a, prune: {method: icbs, sparsity: 0.5, after: b}}", "sweeps"),
        ("{name: a, prune: {method: icbs, sparsity: 0.5, options: {sweeps: 2}, after: b}}", "no row"),
        ("{name: a, prune: {method: wanda, sparsity: 0.5}, format: int4}", "method"),
    ],
)
def test_rows_that_make_no_sense(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        table(tmp_path, f"  - {row}\n")
    with pytest.raises(ValidationError):
        Prune(method="wanda", sparsity=1.5)


def curve(sweeps: int) -> list[dict[str, float]]:
    start = {"number": 0, "held_back": 4.0, "seconds": 0.0}
    return [start, *({"number": n, "held_back": 4.0 - 0.1 * n, "seconds": 60.0} for n in range(1, sweeps + 1))]


def test_masks_are_kept_for_the_next_row(tmp_path: Path) -> None:
    checkpoint, states = tmp_path / "checkpoint", tmp_path / "states"
    checkpoint.mkdir()
    keep_state(checkpoint, states, Cost(1, 1, 1))
    assert found_state(states) is None
    (checkpoint / "compress_icbs.state").write_bytes(b"masks")
    (checkpoint / "compress_icbs.json").write_text(json.dumps({"curve": curve(2)}))
    keep_state(checkpoint, states, Cost(10, 8, 100))
    found = found_state(states)
    assert found is not None
    state, done, cost = found
    assert (state.read_bytes(), done) == (b"masks", 2)
    assert joined(cost, Cost(5, 4, 300)) == Cost(15, 12, 300)


def test_the_picture_shows_the_longest_run(tmp_path: Path) -> None:
    found = table(tmp_path, SEARCH)
    for name, sweeps in (("two", 2), ("six", 6)):
        (row,) = [row for row in found.rows if row.name == name]
        record = Record(name, found.digest(row), "f", (), {}, curve=curve(sweeps), sparsity=0.5)
        record.write(tmp_path / "results" / f"{found.key(row)}.json")
        (line,) = find_lines(found, tmp_path / "results")
        assert line.points[-1] == pytest.approx((float(sweeps), 4.0 - 0.1 * sweeps))
        assert len(line.points) == sweeps + 1
    root = ElementTree.fromstring(draw([line, Line("70 %", ((0.0, 5.0), (3.0, 4.5)))], "a < b"))
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(circles) == 7 + 2
    heights = [float(circle.get("cy", "")) for circle in circles[:7]]
    assert heights == sorted(heights), "the loss falls, so the line goes down"
    assert "a < b" in "".join(root.itertext())


def test_pages_with_pruned_rows_show_zeros(tmp_path: Path) -> None:
    table(tmp_path, SEARCH)
    page = render_table(tmp_path / "t.yaml", tmp_path)
    assert "| weights | zeros | perplexity |" in page


def test_the_projects_table_asks_for_what_it_should() -> None:
    rows = {row.name: row for row in read_table(TABLES / "pruning.yaml").rows}
    for amount in ("50 %", "70 %", "2:4"):
        assert {f"{method} {amount}" for method in ("magnitude", "wanda", "sparsegpt")} <= rows.keys()
        assert {f"icbs {amount}, {sweeps} sweeps" for sweeps in (2, 6, 18)} <= rows.keys()
