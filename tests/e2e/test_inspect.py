"""The page of `compress inspect --html`: complete, self-contained, right numbers; and a browser shows it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import compressor
from compressor.cli.app import app
from compressor.formats.activations import get_input_format
from compressor.inputs import Quantize
from compressor.inspection import inspect_checkpoint
from compressor.measure import EVALUATION
from compressor.output import REPORT
from compressor.runtime import dequantized
from compressor.ship.look import Run, component_of, count_inputs, frontier, look_at_inputs, runs_in, sizes_of
from compressor.ship.svg import Chart, log_ticks, nice_ticks
from compressor.testing.evaluations import evaluation, kl_task, perplexity_task
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, write_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, two results of it, and what an evaluation of them might have said."""
    folder = tmp_path_factory.mktemp("runs")
    source = save_checkpoint(tiny_llama(5), folder / "tiny")
    text = write_text(folder / "t.txt", 1200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)  # type: ignore[attr-defined]
        common = {"data": str(text), "n_samples": 4, "seq_len": 32}
        overrides = {"*.down_proj*": "int8"}
        compressor.quantize(
            str(source), method="rtn", format="int4", output=folder / "a", overrides=overrides, inputs=None, **common
        )
        compressor.quantize(str(source), method="gptq", inputs="int8-tensor", output=folder / "b", **common)
    for name, kl in (("a", 0.2), ("b", 0.01)):
        scores = {"kl": kl_task([kl, 1.1 * kl] * 8), "perplexity": perplexity_task([3.0, 3.2] * 8)}
        (folder / name / EVALUATION).write_text(json.dumps(evaluation(name, scores, "tiny").to_json()))
    return folder


def page_of(runs: Path, tmp_path: Path, *words: object) -> str:
    path = tmp_path / "pages" / "page.html"
    done = CliRunner().invoke(app, ["inspect", *(str(word) for word in words), "--html", str(path)])
    assert done.exit_code == 0, done.output
    return path.read_text()


class Outline(HTMLParser):
    """Collects headings, addresses and table cells; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag == "h2":
            self.headings.append("")
        if tag == "td":
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect", "circle", "polyline")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


def test_the_page_is_complete_and_needs_nothing(runs: Path, tmp_path: Path) -> None:
    text = page_of(runs, tmp_path, runs / "a", "--baseline", runs / "tiny", "--against", runs / "b")
    seen = Outline(text)
    sections = ["Error per layer", "Bits per layer", "Weights, inputs and grids", "Size by component"]
    assert seen.headings == [*sections, "Runs in the folder", "Layers"]
    assert seen.links == []
    assert "<script" not in text
    assert set(re.findall(r"https?://[^\"< ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 4 + 2 * 3
    for chart in charts:
        for element in ET.fromstring(chart).iter():
            assert not any("nan" in value.lower() for value in element.attrib.values()), element.attrib
    rows = [row for row in seen.rows if row]
    assert len(rows) == 14
    assert all(len(row) == 11 for row in rows)


def test_numbers_of_layers_are_those_of_the_weights(runs: Path, tmp_path: Path) -> None:
    found = {layer.name: layer for layer in inspect_checkpoint(runs / "a").layers}
    weights = {name: value.float() for name, value in dequantized(runs / "a")}
    for name, layer in found.items():
        weight = weights[f"{name}.weight"]
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()))
        assert layer.outlier == pytest.approx(float(weight.abs().max() / weight.square().mean().sqrt()), rel=1e-4)
    assert {layer.inputs for layer in inspect_checkpoint(runs / "b").layers} == {"int8-tensor"}
    rows = [row for row in Outline(page_of(runs, tmp_path, runs / "a", "--no-inputs")).rows if row]
    for row in rows:
        layer = found[row[0]]
        assert row[3:8:2] == [
            f"{layer.bits:.3f}",
            f"{layer.output_error:.4f}" if layer.output_error else "",
            f"{layer.sparsity:.1%}",
        ]


def test_the_terminal_compares_two(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["inspect", str(runs / "a"), "--against", str(runs / "b"), "--json"])
    data = json.loads(done.output)
    assert len(data["layers"]) == len(data["against"]["layers"]) == 14
    monkeypatch.setattr("compressor.cli.inspect.STDOUT", Console(width=180))
    done = CliRunner().invoke(app, ["inspect", str(runs / "a"), "--against", str(runs / "b")])
    assert done.exit_code == 0, done.output
    assert "its output error" in done.output


def test_inputs_and_their_grid(runs: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    free, rounded = (look_at_inputs(runs / folder, [name], text=str(runs / "t.txt"))[0] for folder in "ab")
    assert sum(free.counts) == sum(rounded.counts) == free.tokens * 64
    assert free.grid == rounded.grid == ()  # 256 values are no lines to draw
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30
    seen = count_inputs("x", x, (Quantize(get_input_format("int4-token")),), 42)
    assert seen.outlier > 8
    assert seen.tokens == 50
    # The scale is a token's largest magnitude over 7.5, the codes go from -8 to 7.
    assert seen.grid == pytest.approx([code / 7.5 for code in range(-8, 8)], abs=1e-4)


def test_sizes_by_component(runs: Path) -> None:
    sizes = {size.component: size for size in sizes_of(runs / "a")}
    report = json.loads((runs / "a" / REPORT).read_text())
    assert sum(size.before for size in sizes.values()) == report["bytes_before"]
    assert sum(size.after for size in sizes.values()) == report["bytes_after"]
    assert sizes["embeddings"].before == sizes["embeddings"].after > 0
    assert sizes["attention"].after < sizes["attention"].before / 5
    assert sizes_of(runs / "tiny") == ()
    names = {
        "model.layers.0.mlp.experts.3.down_proj.weight": "experts",
        "model.layers.0.mlp.gate.weight": "routers",
        "model.layers.0.mlp.gate_proj.weight": "feed-forward",
        "model.layers.0.block_sparse_moe.gate.weight": "routers",
        "model.layers.0.self_attn.q_norm.weight": "norms and others",
        "transformer.h.0.attn.c_attn.weight": "attention",
        "encoder.layer.0.intermediate.dense.weight": "feed-forward",
        "bert.embeddings.word_embeddings.weight": "embeddings",
        "lm_head.weight": "output head",
    }
    assert {name: component_of(name) for name in names} == names


def test_runs_and_their_frontier(runs: Path, tmp_path: Path) -> None:
    found, notes = runs_in(runs)
    assert notes == ()
    assert {run.name: run.metric for run in found} == {"a": "kl", "b": "kl"}
    copy = shutil.copytree(runs, tmp_path / "copy")
    (copy / "a" / EVALUATION).write_text("{}")
    found, notes = runs_in(copy)
    assert [run.name for run in found] == ["b"]
    assert notes[0].startswith("a: left out: ")
    cloud = [
        Run(str(i), size, value, None, "kl", "")
        for i, (size, value) in enumerate([(3, 1), (1, 5), (2, 6), (2, 4), (4, 1)])
    ]
    assert [run.name for run in frontier(cloud)] == ["1", "3", "0"]


def test_ticks_and_scales() -> None:
    assert nice_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0.1, 0.1, 5) == [0.1]
    assert nice_ticks(-30, 95, 5) == [0, 50]
    assert log_ticks(0.02, 3) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    chart = Chart(100, 100, "<&>", left=10, right=10, top=10, bottom=10)
    y = chart.y(0.01, 1, log=True)
    assert [y(value) for value in (1, 0.1, 0.01, 0, 5)] == pytest.approx([10, 50, 90, 90, 10])
    chart.text(1, 2, "a < b & c")
    root = ET.fromstring(chart.svg())
    assert root.attrib["aria-label"] == "<&>"
    assert root[0].text == "a < b & c"


@pytest.mark.browser
def test_a_browser_shows_it(runs: Path, tmp_path: Path) -> None:
    """Chromium lays the page out without an error, nothing is wider than it, and every chart has a place."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    page_of(runs, tmp_path, runs / "a", "--baseline", runs / "tiny", "--against", runs / "b")
    path = tmp_path / "pages" / "page.html"
    probe = (
        "<script>addEventListener('load', () => { const box = e => e.getBoundingClientRect();"
        "document.body.dataset.seen = JSON.stringify({ wide: document.documentElement.scrollWidth, shown: innerWidth,"
        "charts: [...document.querySelectorAll('svg')].map(e => [box(e).width, box(e).height]),"
        "cut: [...document.querySelectorAll('svg text')].filter(e => { const a = box(e), b = box(e.closest('svg'));"
        "return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; })"
        ".map(e => e.textContent) }); });</script></body>"
    )
    path.write_text(path.read_text().replace("</body>", probe))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,3000", "--virtual-time-budget=2000"]
    place = [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, *place, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["wide"] <= seen["shown"]
    assert len(seen["charts"]) == 10
    assert all(width > 300 and height > 60 for width, height in seen["charts"])
    assert seen["cut"] == []
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *flags, *place, f"--screenshot={picture}", path.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert picture.stat().st_size > 50_000
