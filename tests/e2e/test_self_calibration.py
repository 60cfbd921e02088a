"""Calibration text that the model writes itself: the same every time, several samples side by side."""

from __future__ import annotations

from pathlib import Path

import torch

import compressor
from compressor.api.calibrating import GENERATED_AT_ONCE
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, tree_hash


def test_the_model_writes_its_own_calibration_text(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama().to(torch.bfloat16), tmp_path / "source")
    samples = GENERATED_AT_ONCE + 2  # the last ones are fewer than are written at once
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = compressor.quantize(
            str(tmp_path / "source"),
            output=tmp_path / name,
            method="gptq",
            format="int4",
            group_size=32,
            data="self",
            n_samples=samples,
            seq_len=12,
            seed=seed,
        )
        assert {row.tokens for row in report.rows if row.action.startswith("int4")} == {samples * 12}
        hashes.append(tree_hash(tmp_path / name)["model.safetensors"])
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]
