"""Pages: no link or anchor leads nowhere, numbers quoted are those of the tables, examples run, the site is whole."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import RecipeError
from compressor.pages.assemble import ROOT
from compressor.pages.measured import measured_rows
from compressor.pages.site import home, main, make_site, moved
from compressor.testing.methods import failing_checks

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "compressor").glob("*/*.md"),
        *(ROOT / "evals" / "bench" / "tables").glob("*.md"),
    ]
)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def prose(text: str) -> list[str]:
    """Lines that are no code."""
    lines, code = [], False
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
        elif not code:
            lines.append(line)
    return lines


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as repository hosts and site generators make them."""
    found: dict[str, int] = {}
    for line in prose(path.read_text(encoding="utf-8")):
        if match := re.match(r"#{1,6} (.+)", line):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {slug if not n else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)}


def links(path: Path) -> Iterator[tuple[str, str]]:
    for line in prose(path.read_text(encoding="utf-8")):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if not re.match(r"[a-z]+:", target):
                place, _, anchor = target.partition("#")
                yield place, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for place, anchor in links(page):
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {place} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_the_walk_sees_links_and_anchors(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# A `b` c!\n\n[x](y.md#z) `[no](no.md)` [h](https://a.b)\n\n```\n# no\n[n](o.md)\n```\n\n## Two\n\n## Two\n"
    )
    assert list(links(page)) == [("y.md", "z")]
    assert anchors(page) == {"a-b-c", "two", "two-1"}
    assert len(PAGES) > 40
    assert sum(1 for path in PAGES for _ in links(path)) > 100


def test_numbers_of_the_page_on_choosing_are_those_of_the_tables() -> None:
    rows = {one.name: one for one in measured_rows()}
    quoted = 0
    for line in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or "/tables/" not in cells[6]:
            continue
        _, _, name, bits, kl, time, table = cells
        one = rows[name.strip("`")]
        assert (bits, kl, time) == (one.cells["bits per weight"], one.cells["KL"], one.cells["CPU time"]), name
        assert f"({one.table})" in table.replace("../evals/bench/tables/", "").replace(".md)", ")")
        quoted += 1
    assert quoted >= 10


def test_the_example_of_a_method_passes_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert code
    (tmp_path / "shrink.py").write_text(code[1])
    (tmp_path / "shrink.md").write_text("# shrink\n\n- `tries`: how many\n")
    spec = importlib.util.spec_from_file_location("shrink", tmp_path / "shrink.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shrink", module)
    spec.loader.exec_module(module)
    assert failing_checks(module.Shrink(), "int4") == []


def navigation() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    members = entry.values() if isinstance(entry, dict) else entry
    return [leaf for member in members for leaf in leaves(member)]


def test_the_navigation_names_pages_once() -> None:
    named = leaves(navigation())
    assert len(named) == len(set(named))
    docs = ROOT / "docs"
    assert set(named) <= {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}


def test_links_of_the_site() -> None:
    exists = {"docs/gate.md", "tests/t.py", "evals/bench/tables/x.md", "docs/methods/gptq.md"}
    exists |= {"evals/bench/tables/x.svg", "tests/t.svg"}
    table = "evals/bench/tables/x.md"
    code = "```\n[a](../gate.md)\n```"
    text = f"[a](../gate.md#rules) [b](../../tests/t.py) [`x`](../../{table}) [c](nowhere.md)\n{code}"
    assert moved(text, "docs/methods/gptq.md", exists.__contains__) == (
        f"[a](../gate.md#rules) b [`x`](../tables/x.md) [c](nowhere.md)\n{code}\n"
    )
    assert (
        moved("[g](../../../docs/methods/gptq.md)", "evals/bench/tables/x.md", exists.__contains__)
        == "[g](../methods/gptq.md)\n"
    )
    pictures = "![p](../../evals/bench/tables/x.svg) ![q](../../tests/t.svg)"
    assert moved(pictures, "docs/methods/gptq.md", exists.__contains__) == "![p](../tables/x.svg) q\n"
    assert home("README.md") == ""


def test_the_source_of_the_site_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "site")]) == 0
    made = tmp_path / "site"
    named = leaves(yaml.safe_load((made / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert "tables/weight-only.md" in named
    assert sorted(named) == sorted(path.relative_to(made / "docs").as_posix() for path in (made / "docs").rglob("*.md"))
    for path in (made / "docs").rglob("*.md"):
        for place, _ in links(path):
            assert not place or (path.parent / place).resolve().exists(), f"{path}: {place}"
    (made / "docs" / "old.md").write_text("gone after the next call")
    make_site(made)
    assert not (made / "docs" / "old.md").exists()
    with pytest.raises(RecipeError, match=r"mkdocs\.yml"):
        make_site(tmp_path / "other", root=tmp_path)


@pytest.mark.parametrize("name", ["bug", "quality", "idea"])
def test_issue_forms_ask_something(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])
