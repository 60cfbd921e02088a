"""Rows with several seeds, and texts of which a part is meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.evals.bench.inputs import _part
from compressor.evals.bench.record import Record
from compressor.evals.bench.rows import expert_tokens
from compressor.evals.bench.seeds import seeds_section
from compressor.evals.bench.steps import Cost
from compressor.evals.bench.table import Table, read_table
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate, Model, Samples, TaskResult

SHA = "0" * 64
YAML = """
title: T
model: m
calibration: {file: a.txt, sha256: "SHA", part: PART, samples: 1, seq_len: 4}
evaluation: {file: a.txt, sha256: "SHA", tokens: 8, context: 4}
rows:
  - {method: [rtn, gptq], format: int4, seeds: [0, 1, 2]}
  - {method: rtn, format: int4}
"""


def table(path: Path, part: str = "[0.5, 1.0]") -> Table:
    path.write_text(YAML.replace("SHA", SHA).replace("PART", part), encoding="utf-8")
    return read_table(path)


def record(perplexity: float, agreement: float) -> Record:
    samples = Samples((0,), ("h",), (1,), {"nll": (1.0,)})
    one = {"perplexity": {"perplexity": perplexity}, "kl": {"kl": perplexity / 100, "agreement": 0.5}}
    one["routers"] = {"router_agreement": agreement, "router_kl": 0.25}
    tasks = {
        name: TaskResult("1", {}, {key: Estimate(value, None) for key, value in metrics.items()}, samples)
        for name, metrics in one.items()
    }
    evaluation = Evaluation(Model("m", None, "f", "path", "float32"), None, {}, 0, tasks, {})
    experts = {"routed_fewest": perplexity, "used_fewest": 30.0, "topped_up": 2.0}
    cost = {"quantize": Cost(1.0, 4.0, 5)}
    return Record("r", "d", "f", (), {}, bits_per_weight=4.5, experts=experts, cost=cost, evaluation=evaluation)


def test_seeds_make_rows_and_a_row_with_the_tables_seed_is_the_same(tmp_path: Path) -> None:
    made = table(tmp_path / "t.yaml")
    names = [row.name for row in made.rows]
    assert names[1:4] == ["int4 rtn seed 0", "int4 rtn seed 1", "int4 rtn seed 2"]
    digests = {row.name: made.digest(row) for row in made.rows}
    assert digests["int4 rtn seed 0"] == digests["int4 rtn"] != digests["int4 rtn seed 1"]
    assert made.calibration.part == (0.5, 1.0)
    for wrong in ("[0.5, 0.5]", "[-1, 1]", "[0, 2]"):
        with pytest.raises(RecipeError, match="is not a start and a stop"):
            table(tmp_path / "wrong.yaml", wrong)


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    made = table(tmp_path / "t.yaml")
    records: dict[str, Record | None] = {row.name: None for row in made.rows}
    records["int4 rtn seed 0"], records["int4 rtn seed 1"] = record(10, 0.9), record(12, 0.8)
    records["int4 rtn seed 2"] = record(14, 0.7)
    lines = seeds_section(made, records)
    row = next(line for line in lines if line.startswith("| int4 rtn |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("int4 rtn", "3", "4.50", "12.00 ± 2.00", "0.1200 ± 0.0200", "50.0 ± 0.0 %"),
        *("80.0 ± 10.0 %", "0.2500 ± 0.0000", "10, 30", "4 s"),
    ]
    assert "| int4 gptq | 0 of 3 |" in "\n".join(lines)
    assert seeds_section(made.model_copy(update={"rows": (made.rows[0], made.rows[-1])}), records) == []


def test_what_a_report_says_about_experts() -> None:
    rows = [{"tokens": 9, "routed": 3}, {"tokens": 5, "routed": 5}, {"tokens": 1, "routed": None}, {"tokens": 2}]
    units = [{"expert_tokens_fewest": 3, "experts_topped_up": 1}, {"seconds": 1}]
    assert expert_tokens({"units": units, "rows": rows}) == {"routed_fewest": 3, "used_fewest": 5, "topped_up": 1}
    assert expert_tokens({"units": [{"seconds": 1}], "rows": rows}) is None
    old = json.loads(json.dumps(replace(record(1, 1), experts=None).to_json()))
    assert old["experts"] is None


def test_a_part_of_a_text(tmp_path: Path) -> None:
    whole = tmp_path / "a.txt"
    whole.write_text("äbcdefghij", encoding="utf-8")
    parts = [_part(whole, part, tmp_path / "work").read_text(encoding="utf-8") for part in ((0, 0.6), (0.6, 1))]
    assert parts == ["äbcdef", "ghij"]
