"""The pages of docs/methods: made from the code and the tables, and not stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from compressor.errors import RecipeError
from compressor.evals.bench.table import TABLES
from compressor.formats import BUILDERS, get_format, parse_group_size
from compressor.methods import METHODS, method_class
from compressor.methods.base import MethodOptions, Stream
from compressor.methods.facts import FACTS, FAMILIES, Facts, family
from compressor.pages.__main__ import STALE, main
from compressor.pages.assemble import END, FOLDER, ROOT, beside, moved_links, page, pages, sections
from compressor.pages.measured import cost, measured_rows, page_rows, seconds
from compressor.pages.options import options_table, prose_of
from compressor.plan import Kind, WeightRef, Where
from compressor.pruning import PRUNERS


class Sample(MethodOptions):
    """One option of every kind."""

    kind: Literal["a", "b"] = Field("a", description="which")
    share: float = Field(0.5, gt=0, lt=1, description="how much")
    steps: int | None = Field(None, ge=1, description="how often | or never")
    on: bool = Field(True, description="whether")


def test_the_table_of_options_says_values_defaults_and_meaning() -> None:
    lines = options_table(Sample, {"on": "said by the page"})
    assert lines[2:] == [
        "| `kind` | `a`, `b` | `a` | which |",
        "| `share` | above 0, below 1 | `0.5` | how much |",
        "| `steps` | at least 1 | unset | how often \\| or never |",
        "| `on` | `true`, `false` | `true` | said by the page |",
    ]
    assert options_table(MethodOptions) == []


def test_prose_is_taken_from_bullets_that_name_one_option() -> None:
    found = prose_of(
        "- `a` (default 3, 1 to 5): first line\n  goes on.\n- `b`, `c`: two.\nText.\n  not of a\n- `d`: last"
    )
    assert found == {"a": "first line goes on.", "d": "last"}


def measured_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "/evals/bench/tables/" in line and line.startswith("|")]


def rest(text: str) -> list[str]:
    """What does not depend on rows of the tables."""
    quoted = ("| row |", "| --- | ---: |", "KL is to the original", "Measured: no row", "| processor time")
    lines = [line for line in text.splitlines() if line not in measured_lines(text) and not line.startswith(quoted)]
    return [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]


@pytest.mark.parametrize("name", sorted(pages()))
def test_pages_are_not_stale(name: str) -> None:
    # Rows that were made since may be missing; what is quoted must be what the tables say now.
    committed = (ROOT / FOLDER / f"{name}.md").read_text(encoding="utf-8")
    made = page(name, ROOT / FOLDER)
    hint = "run: python -m compressor.pages"
    assert rest(committed) == rest(made), hint
    assert set(measured_lines(committed)) <= set(measured_lines(made)), hint


def test_every_method_has_a_page() -> None:
    on_pages = [method for methods in pages().values() for method in methods]
    assert len(on_pages) == len(set(on_pages))
    assert set(METHODS) <= set(on_pages)
    assert set(on_pages) == {name for name in (*METHODS, *PRUNERS) if beside(name).is_file()}


def folders(place: Path) -> list[str]:
    return ["--folder", str(place), "--studies", str(place)]


def test_a_stale_page_is_found_written_and_what_follows_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", *folders(tmp_path)]) == STALE
    assert not list(tmp_path.iterdir())
    assert main(folders(tmp_path)) == 0
    assert main(["--check", *folders(tmp_path)]) == 0
    rtn = tmp_path / "rtn.md"
    rtn.write_text(rtn.read_text().replace("baseline", "BASE") + "\nby hand\n")
    assert main(folders(tmp_path)) == 0
    assert rtn.read_text().endswith(f"\n{END}\n\nby hand\n")
    assert "BASE" not in rtn.read_text()
    rtn.write_text("# no mark")
    capsys.readouterr()
    assert main(folders(tmp_path)) == RecipeError("").exit_code
    assert "no line '<!-- end -->'" in capsys.readouterr().err
    assert main(folders(tmp_path / "none")) == RecipeError("").exit_code


def test_links_are_moved_with_the_page() -> None:
    folder = ROOT / "compressor" / "methods"
    text = "[a](gptq.md#limits) [b](../../docs/moe.md) [c](https://x.org) [d](#here) [e](../pruning/masks.py)"
    assert moved_links(text, folder) == (
        "[a](gptq.md#limits) [b](../moe.md) [c](https://x.org) [d](#here) [e](../../compressor/pruning/masks.py)"
    )


def test_a_page_falls_into_title_and_parts() -> None:
    assert sections("# T\n\nfirst\n\n## A\n\none\n\n## B\n\ntwo\n") == ("T", {"": "first", "A": "one", "B": "two"})


def test_rows_are_quoted_as_the_tables_have_them() -> None:
    rows = {(one.table, one.name): one for one in measured_rows()}
    assert len({(one.model, one.name) for one in measured_rows()}) == len(rows)
    gptq = rows["learned-rounding", "int4 g64 gptq"]
    assert gptq.method == "gptq"
    assert gptq.grid == rows["weight-only", "int4 g64 rtn"].grid
    assert rows["weight-only", "int4 g64 llmcompressor gptq"].method is None
    text = (TABLES / "learned-rounding.md").read_text(encoding="utf-8")
    assert f"| {gptq.cells['KL']} |" in text
    assert all(one.cells["KL"] != "-" for one in measured_rows())


def test_only_tables_of_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.md"
    path.write_text(
        "| way | KL |\n|---|---|\n| a | 1 |\n\n| row | KL |\n|---|---:|\n| b | 2 |\n\n| row | x |\n|--|--|\n| c | 3 |\n"
    )
    assert page_rows(path) == [{"row": "b", "KL": "2"}, {"row": "c", "x": "3"}]


def test_costs_are_ranges_of_processor_time() -> None:
    assert [seconds(text) for text in ("25 s", "2 m 05 s", "1 h 18 m")] == [25, 125, 4680]
    mine = [one for one in measured_rows() if one.method == "gptq" and one.model == "smollm2-135m"]
    assert mine
    shown = cost("gptq")
    assert shown is not None
    assert shown.endswith(" min")
    assert cost("no-such-method") is None


def weight() -> WeightRef:
    return WeightRef(
        "a.weight", "a.weight", Where(), Kind.LINEAR, (256, 256), (256, 256), "BF16", 0, "a.weight", "a.weight"
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_facts_are_those_of_the_classes(name: str) -> None:
    cls: Any = method_class(name)
    method = cls(cls.Options())
    facts = FACTS[name]
    assert facts.scope == method.scope.value
    assert facts.data.startswith("none" if method.stream is Stream.NONE else "text")
    for known in BUILDERS:
        fmt = get_format(known, parse_group_size(known, None), torch.bfloat16)
        assert (method.refuse(weight(), fmt) is None) == (family(known) in facts.families), f"{name} with {known}"
        low, _, high = FAMILIES[family(known)].partition("-")
        assert int(low) <= fmt.bits <= int(high or low)


def test_bits_are_those_of_all_families() -> None:
    assert Facts("layer", "none", ("nvfp4",)).bits == "4"
    assert Facts("layer", "none", ("nvfp4", "fp8")).bits == "4-8"
