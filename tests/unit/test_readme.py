"""Numbers the README quotes are those of the committed result files."""

from __future__ import annotations

import re

import pytest

from compressor.evals.bench.leads import find_leads, kl_of
from compressor.evals.bench.record import Record, read_record
from compressor.evals.bench.table import RESULTS, TABLES, read_table
from compressor.evals.bench.vision_table import is_vision
from compressor.pages.assemble import ROOT

MODEL = "smollm2-135m"
GROUPED = ("int", "power")
"""How formats with one scale per 64 inputs begin."""

TOOLS = {"llm-compressor RTN": "llmcompressor rtn", "llm-compressor GPTQ": "llmcompressor gptq"}


def records() -> dict[str, Record]:
    """Row -> its result, for every finished row of the default model; shared rows have the same result everywhere."""
    found = {}
    for path in sorted(TABLES.glob("*.yaml")):
        if is_vision(path) or path.stem in ("calibration", "peers") or read_table(path).model != MODEL:
            continue
        table = read_table(path)
        for row in table.rows:
            record = read_record(RESULTS / path.stem / f"{table.key(row)}.json")
            if record is not None and record.evaluation is not None and table.planted is None:
                found[row.name] = record
    return found


def lines_below(heading: str, text: str) -> list[list[str]]:
    """Cells of the table below a heading, its head and its rule left out."""
    below = text.split(f"\n## {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def row_of(label: str) -> str:
    """Name of the row that a label of the README's table of costs stands for."""
    if label.startswith("original"):
        return "original"
    way, _, fmt = label.replace("*", "").rpartition(", ")
    way = re.sub(r" \(.*?\)", "", way).strip("`").replace(" --effort ", " effort=")
    way = "autoround" if way == "AutoRound" else TOOLS.get(way, way)
    return f"{fmt} g64 {way}" if fmt.startswith(GROUPED) else f"{fmt} {way}"


def row_of_command(command: str) -> str:
    """Name of the row that a command of the README's table of methods makes."""
    words = command.split()
    flags = dict(zip(words, [*words[1:], ""], strict=True))
    fmt, inputs = flags.get("--format", "int8"), flags.get("--inputs")
    group = " g64" if fmt.startswith(GROUPED) and not inputs else ""
    option = f" {flags['--option']}" if "--option" in flags else ""
    return f"{fmt}{group} {flags['--method']}{option}" + (f" inputs {inputs}" if inputs else "")


def as_quoted(value: float, quoted: str) -> str:
    """A value with as many decimals as what is quoted has."""
    decimals = len(quoted.partition(".")[2])
    return f"{value:,.{decimals}f}"


def check_estimate(record: Record, task: str, metric: str, quoted: str, scale: float = 1.0) -> None:
    assert record.evaluation is not None
    estimate = record.evaluation.tasks[task].metrics[metric]
    value, _, error = quoted.replace("*", "").replace(" %", "").partition(" ± ")
    found = as_quoted(scale * estimate.value, value)
    assert found == value, f"{metric} of {record.name!r}: the README quotes {value}, the row has {found}"
    if error:
        assert estimate.standard_error is not None
        found = as_quoted(scale * estimate.standard_error, error)
        assert found == error, f"error of {metric} of {record.name!r}: the README quotes {error}, the row has {found}"


def check_time(record: Record, quoted: str) -> None:
    counts = {unit: int(number) for number, unit in re.findall(r"(\d+) ([hms])", quoted)}
    seconds = record.cost["quantize"].cpu_seconds
    wanted = 3600 * counts.get("h", 0) + 60 * counts.get("m", 0) + counts.get("s", 0)
    # Hours come with whole minutes, which are cut and not rounded.
    assert wanted <= round(seconds) < wanted + (60 if "h" in counts else 1), (record.name, seconds)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_it_costs() -> None:
    known = records()
    rows = lines_below("What it costs", readme())
    for label, weights, bits, perplexity, kl, agreement, time in rows:
        record = known[row_of(label)]
        check_estimate(record, "perplexity", "perplexity", perplexity)
        if weights:
            assert record.weight_bytes is not None
            assert f"{record.weight_bytes / 1e6:.0f} MB" == weights, label
        assert record.bits_per_weight is not None
        assert as_quoted(record.bits_per_weight, bits) == bits, label
        if row_of(label) != "original":
            check_estimate(record, "kl", "kl", kl)
            check_estimate(record, "kl", "agreement", agreement, 100)
            check_time(record, time)
    assert len(rows) >= 15


def leads() -> list[list[str]]:
    """Cells that the README's table of other tools must have."""
    table = read_table(TABLES / "peers.yaml")
    found = {row.name: read_record(RESULTS / "peers" / f"{table.key(row)}.json") for row in table.rows}
    lines = []
    for lead in find_leads(table, found):
        best = [cell for side in (lead.ours, lead.theirs) for cell in (f"`{side.name}`", f"{kl_of(side):.3f}")]
        value, error = lead.difference.value, lead.difference.standard_error
        lines.append([lead.job, *best, f"{value:+.3f} ± {error:.3f}", lead.ahead])
    return lines


def test_beside_other_tools() -> None:
    assert lines_below("Beside other tools", readme()) == leads()


def test_which_method() -> None:
    known, checked = records(), 0
    for _, command, bits, kl, time in lines_below("Which method", readme()):
        if not command.startswith("`--method") or not kl:
            continue
        record = known[row_of_command(command.strip("`"))]
        assert record.bits_per_weight is not None
        assert as_quoted(record.bits_per_weight, bits) == bits, command
        check_estimate(record, "kl", "kl", kl)
        check_time(record, time)
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("original (bf16)", "original"),
        ("`rtn`, int8", "int8 g64 rtn"),
        ("**`flexround --effort best`** (128 samples), int3", "int3 g64 flexround effort=best"),
        ("AutoRound (50 iterations), int4", "int4 g64 autoround"),
        ("llm-compressor GPTQ, nvfp4", "nvfp4 llmcompressor gptq"),
    ],
)
def test_labels_stand_for_rows(label: str, name: str) -> None:
    assert row_of(label) == name


def test_a_wrong_number_is_seen() -> None:
    record = records()["int4 g64 gptq"]
    check_estimate(record, "kl", "kl", "0.156 ± 0.005")
    with pytest.raises(AssertionError):
        check_estimate(record, "kl", "kl", "0.157 ± 0.005")
    with pytest.raises(AssertionError):
        check_estimate(record, "kl", "kl", "0.156 ± 0.006")
    with pytest.raises(AssertionError):
        check_time(record, "1 m 52 s")
