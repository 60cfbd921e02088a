"""The bench: its arithmetic, its tables, and what it does without a GPU."""

import json
import math
from pathlib import Path

import pytest
import torch

from compressor.kernels.bench.__main__ import empty_report, main
from compressor.kernels.bench.measure import repack_seconds
from compressor.kernels.bench.results import NOT_MEASURED, Cell, Machine, Report, geomean, render
from compressor.kernels.bench.roofline import FORMATS, LAYERS, ROWS, floor_seconds, ideal_speedup, layer_bytes
from compressor.kernels.gpu import int_weight
from compressor.kernels.gpu.launch import Counters
from compressor.kernels.gpu.prepare import decode
from compressor.kernels.gpu.samples import random_int_weight, random_weight
from compressor.kernels.gpu.timing import copies_for

BY_NAME = {row.name: row for row in FORMATS}


def test_bytes_of_a_layer_are_those_of_the_weight_in_memory() -> None:
    for row in FORMATS:
        if row.inputs:
            integers = random_int_weight(int(row.grid.removeprefix("int")), 128, 256, row.group)
            assert integers.nbytes == row.weight_bytes(128, 256), row.name
            assert torch.isfinite(int_weight.decode(integers)).all()
            continue
        weight = random_weight(row.grid, 128, 256, row.kind, group=row.group)
        assert weight.nbytes == row.weight_bytes(128, 256), row.name
        assert torch.isfinite(decode(weight)).all()
    experts = BY_NAME["int4 g128, 8 experts"]
    touched = [experts.touched_bytes(128, 256, m) // experts.weight_bytes(128, 256) for m in (1, 2, 4, 100)]
    assert touched == [2, 4, 8, 8]
    assert BY_NAME["int4 g128"].weight_bytes(8192, 8192) * 8 / 8192**2 == 4.125
    assert math.isclose(BY_NAME["nvfp4"].weight_bytes(8192, 8192) * 8 / 8192**2, 4.5, rel_tol=1e-3)


def test_roofline_of_an_h200() -> None:
    # 4.8 TB/s and 989 TFLOP/s: int4 in groups of 128 on 8192 x 8192.
    packed = BY_NAME["int4 g128"].weight_bytes(8192, 8192)
    ideal = {m: round(ideal_speedup(packed, m, 8192, 8192, 4.8e12, 989e12), 2) for m in (1, 16, 64, 128, 256)}
    assert ideal == {1: 3.88, 16: 3.84, 64: 3.27, 128: 1.66, 256: 1.0}
    assert layer_bytes(100, 2, 3, 4) == 100 + 2 * 2 * 7
    assert floor_seconds(packed, 1024, 8192, 8192, 4.8e12, 989e12) == 2 * 1024 * 8192**2 / 989e12


def test_copies_outgrow_the_cache() -> None:
    assert copies_for(10 << 20, 50 << 20) == 15
    assert copies_for(1 << 30, 50 << 20) == 2
    assert copies_for(10 << 20, 50 << 20) * (10 << 20) >= 3 * (50 << 20)


def test_tables_show_rates_ratios_and_peers() -> None:
    cell = Cell("int4 g128", "70B o", 16, 34_603_008, 20e-6, 40e-6, {"gemlite": 30e-6}, 0.0021, "small")
    other = Cell("int4 g128", "70B o", 32, 34_603_008, 40e-6, 40e-6, {}, 0.0021, "small")
    text = render(Report(Machine("Some GPU", "9.0", 4e12, 700e12, {"torch": "2"}), (cell, other)))
    assert "Some GPU (compute capability 9.0)" in text
    assert "| 70B o | 16 | 20.00 | 1756 | 44 % | 107.4 | 15 % | 2.00 | 1.50 | 2.1e-03 | small |" in text
    assert f"| 1.00 | {NOT_MEASURED} | 2.1e-03 | small |" in text
    assert "for up to 64 rows: 1.41." in text
    assert geomean([]) is None


def test_without_a_gpu_the_table_says_so_and_the_run_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = ["--layer", "70B o", "--rows", "1", "64", "--format", "int4 g128", "nvfp4"]
    assert main([*chosen, "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "No CUDA device was there: nothing below is a measurement." in text
    written = (tmp_path / "kernels.md").read_text()
    assert written.strip() == text.strip()
    rows = [line for line in written.splitlines() if line.startswith("| 70B o")]
    assert len(rows) == 4
    assert all(row.count(NOT_MEASURED) == 7 for row in rows)
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert data["machine"]["name"] == NOT_MEASURED
    assert {cell["seconds"] for cell in data["cells"]} == {None}


def test_laying_weights_out_is_timed() -> None:
    for row in FORMATS:
        assert 0 < repack_seconds(row, "cpu", (64, 256)) < 60, row.name
    report = empty_report(FORMATS, ["70B o"], [1])
    assert report.repack == {row.name: None for row in FORMATS}
    cost = {"int4 g128": 0.0123, "nvfp4": None}
    text = render(Report(Machine("Some GPU", "9.0", 4e12, 700e12), report.cells[:1], cost))
    assert f"in seconds: int4 g128 0.0123, nvfp4 {NOT_MEASURED}." in text


def test_the_whole_table_has_every_cell() -> None:
    report = empty_report(FORMATS, list(LAYERS), ROWS)
    assert len(report.cells) == len(FORMATS) * len(LAYERS) * len(ROWS)
    assert all(cell.speedup is None and cell.bytes_per_second is None for cell in report.cells)


def test_unknown_names_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--layer", "70B p"])
    assert caught.value.code == 2
    assert "70B p" in capsys.readouterr().err


def test_counters_are_zero_without_a_gpu_and_never_shared() -> None:
    counters = Counters()
    first, second = (counters.get(7, torch.device("cpu")) for _ in range(2))
    assert first.tolist() == [0] * 7
    assert first.data_ptr() != second.data_ptr()
