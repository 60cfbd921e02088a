"""The estimate of a run grows with what makes a run long, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.api import prepare
from compressor.estimate import SECONDS_PER_BYTE, estimate_seconds
from compressor.recipe import CalibrationSpec, Recipe
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

RATE = 1e6
"""Operations per second of the machine the tests pretend to have: slow enough that operations are all that counts."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(models.tiny_llama().to(torch.bfloat16), tmp_path_factory.mktemp("estimate") / "source")


@pytest.fixture
def seconds(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("compressor.estimate.matmul_rate", lambda device: RATE)
    write_text(tmp_path / "text.txt", 1500)

    def estimate(method: str, n_samples: int = 4, **recipe: Any) -> float:
        spec = CalibrationSpec(data=str(tmp_path / "text.txt"), n_samples=n_samples, seq_len=32)
        job = prepare(Recipe(model=str(source), method=method, calibration=spec, **recipe), tmp_path / "unused")
        return estimate_seconds(job.plan, job.method, spec, job.skeleton.device)

    return estimate


def test_rounding_costs_only_its_bytes(source: Path, seconds: Any) -> None:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert seconds("rtn", format="int4", group_size="32") == pytest.approx(5 + size * SECONDS_PER_BYTE, rel=0.01)


def test_only_the_method_that_searches_pays_for_its_search(seconds: Any) -> None:
    searched, compensated = seconds("fp4", format="fp4"), seconds("gptq", format="fp4")
    assert searched > 3 * compensated
    assert compensated == pytest.approx(seconds("gptq", format="int4", group_size="channel"), rel=0.05)


def test_learning_grows_with_steps_and_inputs_with_points(seconds: Any) -> None:
    base, short, long = (
        seconds(method, format="int4", group_size="32", **({"options": {"iters": steps}} if steps else {}))
        for method, steps in (("gptq", 0), ("flexround", 50), ("flexround", 200))
    )
    assert base < short < long < 4 * short
    few, many = (seconds("fp4", format="fp4", inputs="fpq8", options={"points": points}) for points in (10, 40))
    assert few < many < 4 * few


@pytest.mark.parametrize("method", ["gptq", "flexround"])
def test_searching_factors_costs_the_same_in_front_of_any_method(seconds: Any, method: str) -> None:
    plain, scaled = (
        seconds(method, format="int4", group_size="32", options={"scaling": value}) for value in ("off", "awq")
    )
    off, awq = (seconds("gptq", format="int4", group_size="32", options={"scaling": value}) for value in ("off", "awq"))
    assert scaled - plain == pytest.approx(awq - off)
    assert scaled > plain + 1


def test_calibration_grows_with_samples(seconds: Any) -> None:
    few, many = (seconds("gptq", n_samples=n, format="int4", group_size="32") for n in (4, 8))
    assert few < many < 2 * few
