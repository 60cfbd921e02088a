"""The page lists every kind of fault and input that is tried, and was made by a run in which nothing failed."""

from pathlib import Path

import pytest

from compressor.testing.reliability import SECTIONS, Record, add, listed, marked, read, render, update

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def test_page_lists_what_is_tried() -> None:
    assert set(listed(PAGE)) == marked(HERE)
    assert all(listed(PAGE).values())
    assert all(f"### {section}" in PAGE.read_text() for section in SECTIONS)


def test_counts_become_rows(tmp_path: Path) -> None:
    counts, page = tmp_path / "counts.json", tmp_path / "page.md"
    add(counts, [Record("Crashes", "a kill", {"same": 2}), Record("Crashes", "a kill", {"same": 1, "refused": 1})])
    add(counts, [Record("Determinism", "b", {"same": 1})])
    add(counts, [Record("Determinism", "b", {"equal": 4})])  # another session replaces what it counted again
    assert "| a kill | 4 | 3 same; 1 refused |" in render(read(counts))
    page.write_text("before\n" + render([]) + "\nafter\n")
    update(page, read(counts))
    assert listed(page) == {"a kill": 4, "b": 4}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        add(tmp_path / "counts.json", [Record("Miscellaneous", "a", {"b": 1})])
