"""Tables as people write them: grids of rows, what decides whether a result is still good, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import RecipeError
from compressor.evals.bench.table import ORIGINAL, TABLES, Table, find_table, read_table, results_folder

TEXT = {"file": "text.txt", "sha256": "0" * 64}


def described(*rows: Any, **changes: Any) -> dict[str, Any]:
    return {
        "title": "A table",
        "model": "smollm2-135m",
        "calibration": {**TEXT, "samples": 4, "seq_len": 32},
        "evaluation": {**TEXT, "tokens": 512, "context": 64},
        "rows": list(rows) or [{"method": "rtn", "format": "int4"}],
        **changes,
    }


def read(folder: Path, data: Any) -> Table:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return read_table(path)


def test_a_grid_is_all_combinations_format_by_format(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        described(
            {"method": ["rtn", "fp4"], "format": ["int4", "nvfp4"]},
            {"method": "rtn", "format": "int4", "group_size": "tensor", "options": {"clip": "mse"}, "label": "clipped"},
            {"tool": "llmcompressor", "algorithm": "gptq", "format": ["int4", "int3"], "group_size": 64},
            {"tool": "autoround", "iters": 5, "format": "int4", "group_size": 32, "name": "other"},
            {"method": "rtn", "format": "int8", "inputs": "int8-token"},
        ),
    )
    assert [row.name for row in table.rows] == [
        ORIGINAL,
        "int4 rtn",
        "int4 fp4",
        "nvfp4 rtn",
        "nvfp4 fp4",
        "int4 per tensor clipped",
        "int4 g64 llmcompressor gptq",
        "int3 g64 llmcompressor gptq",
        "other",
        "int8 rtn inputs int8-token",
    ]
    assert table.rows[4].method == "fp4"
    assert table.rows[4].format == "nvfp4"
    assert table.rows[5].options == {"clip": "mse"}
    assert table.rows[6].group_size == "64"


def test_the_digest_covers_what_the_result_depends_on_and_nothing_else(tmp_path: Path) -> None:
    row = {"method": "rtn", "format": "int4"}
    text = {**TEXT, "sha256": "1" * 64}
    base = read(tmp_path, described(row))
    original = base.digest(base.rows[0])

    def digests(*rows: Any, **changes: Any) -> tuple[str, str]:
        table = read(tmp_path, described(*rows, **changes))
        return table.digest(table.rows[0]), table.digest(table.rows[1])

    mine = base.digest(base.rows[1])
    assert digests({**row, "name": "renamed"}, title="Another", text="words") == (original, mine)
    for changed in (
        digests({**row, "format": "int3"}),
        digests({**row, "group_size": 32}),
        digests({**row, "inputs": "int8-token"}),
        digests({**row, "options": {"a": 1}}),
        digests({**row, "samples": 5}),
        digests(row, seed=1),
        digests(row, calibration={**TEXT, "samples": 5, "seq_len": 32}),
        digests(row, calibration={**text, "samples": 4, "seq_len": 32}),
    ):
        assert changed[0] == original, "the original depends on no recipe"
        assert changed[1] != mine
    for both in (
        digests(row, model="other/model@main"),
        digests(row, evaluation={**text, "tokens": 512, "context": 64}),
        digests(row, evaluation={**TEXT, "tokens": 511, "context": 64}),
    ):
        assert both[0] != original
        assert both[1] != mine
    assert base.key(base.rows[1]) == f"int4-rtn-{mine[:12]}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("just words", "not a table"),
        ({"rows": 3}, "not a table"),
        (described("word"), "rows.0: 'word' is not a mapping"),
        (described({"method": "rtn", "format": "int99"}), "row 'int99 rtn': unknown format 'int99'"),
        (described({"method": "rtn"}), "row 'rtn': format is missing"),
        (described({"method": "rtn", "format": "int4", "iters": 3}), "iters means nothing for a row of ours"),
        (
            described({"tool": "autoround", "format": "int4", "group_size": 32, "iters": 3, "samples": 5}),
            "samples means nothing for autoround",
        ),
        (described({"tool": "magic", "format": "int4"}), "row 'int4 magic': tool: Input should be"),
        (described({"tool": "autoround", "format": "nvfp4", "iters": 3}), "autoround rows are integers"),
        (described({"tool": "llmcompressor", "algorithm": "rtn", "format": "int4"}), "group_size is None"),
        (described({"method": "rtn", "format": "int4", "name": "original"}), "comes by itself"),
        (described({"method": "rtn", "format": "int4"}, {"method": "rtn", "format": "int4"}), "two rows are called"),
        (described(surprise=1), "surprise: Extra inputs are not permitted"),
        (described(evaluation={**TEXT, "file": "/etc/text.txt", "tokens": 4, "context": 2}), "evaluation.file: String"),
        (described(calibration={"file": "text.txt", "samples": 1, "seq_len": 2}), "calibration.sha256: Field required"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, data)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert "table.yaml" in caught.value.message


def test_unreadable_tables(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_table(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("rows: [", encoding="utf-8")
    with pytest.raises(RecipeError, match="not YAML"):
        read_table(broken)


def test_where_results_are_kept(tmp_path: Path) -> None:
    assert find_table("weight-only") == TABLES / "weight-only.yaml"
    assert results_folder(TABLES / "weight-only.yaml") == TABLES.parent / "results" / "weight-only"
    assert results_folder(tmp_path / "mine.yaml") == tmp_path / "results" / "mine"
    assert find_table("mine.yaml") == Path("mine.yaml")
