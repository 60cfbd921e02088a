"""Values beyond static scales are counted while a model is scored, layer by layer, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compressor
import compressor.verify
from compressor.cli.app import app
from compressor.evals.results import Evaluation
from compressor.evals.saturation import Watch
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.ints import IntFormat
from compressor.inputs import InputOp, Quantize, RoundFloat, Shift, is_static, saturated
from compressor.runtime import PackedLinear
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text


def layer(*ops: InputOp) -> PackedLinear:
    fmt, weight = IntFormat(8, None, torch.float32), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    q = fmt.fit(weight)
    return PackedLinear(fmt.pack(fmt.encode(weight, q), q), fmt, inputs=ops)


def test_a_watch_counts_layer_by_layer() -> None:
    static = Quantize(INPUT_FORMATS["int8-tensor"], torch.tensor([0.1]))
    model = nn.ModuleDict(
        {
            "shifted": layer(Shift(torch.full((4,), 5.0), torch.zeros(3)), static),
            "plain": layer(static),
            "token": layer(Quantize(INPUT_FORMATS["int8-token"])),
            "idle": layer(static),
            "bare": layer(),
        }
    )
    watch = Watch()
    assert watch.result() is None
    watch.over(model)
    x = torch.tensor([[1.0, 14, -9, 100], [0, 12.7, -12.8, 17.5]])  # 14 and 100 are beyond 12.75
    for name in ("shifted", "plain", "token", "bare"):
        model[name](x)
    found = watch.result()
    assert found is not None
    # Less 5: -14 and 95 of the first row, -17.8 of the second.
    assert found.to_json() == {"share": 6 / 16, "layers": 2, "worst": "shifted", "worst_share": 3 / 8}
    model["plain"](x[:, [0, 0, 0, 0]])
    again = watch.result()
    assert again is not None
    assert again.share == 6 / 24


def test_what_reaches_beyond_depends_on_the_format() -> None:
    x = torch.tensor([[0.0, 1.0, 5.9, 6.4, 6.6, -40.0]])
    split, half = torch.tensor([1], dtype=torch.uint8), torch.tensor([0.5])
    e2m1 = RoundFloat(4, half, split, torch.zeros(6, dtype=torch.int8))
    assert saturated(e2m1, x) == int((x.abs() > 7).sum()), "6 is the largest value, and 7 would be nearer to 8"
    louder = RoundFloat(4, half, split, torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.int8))
    assert saturated(louder, x) == 2, "5.9 is doubled first"
    nvfp4 = Quantize(INPUT_FORMATS["nvfp4"], torch.tensor([448.0]))  # groups reach up to 6
    assert saturated(nvfp4, x.repeat(1, 8)) == 8
    token = Quantize(INPUT_FORMATS["int4-token"])
    assert saturated(token, 1e9 * x) == 0
    assert [is_static(op) for op in (e2m1, nvfp4, token, Shift(x[0]))] == [True, True, False, False]


def test_the_evaluation_says_what_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of one word's tokens do not cover other text."""
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    source, text = save_checkpoint(models.tiny_llama(layers=1), tmp_path / "source"), write_text(tmp_path / "t.txt")
    (tmp_path / "cats.txt").write_text("cat " * 400, encoding="utf-8")
    given = {"method": "rtn", "output": tmp_path / "out", "data": str(tmp_path / "cats.txt"), "n_samples": 2}
    compressor.quantize(str(source), inputs="int8-tensor", seq_len=16, **given)  # type: ignore[arg-type]
    small = ["--text", text, "--max-tokens", 120, "--context", 40, "--tasks", "perplexity", "-o", tmp_path / "eval"]
    done = CliRunner().invoke(app, [str(word) for word in ("eval", tmp_path / "out", *small)])
    assert done.exit_code == 0, done.output
    found = Evaluation.read(tmp_path / "eval" / "compress_eval.json").saturation
    assert found is not None
    assert found["layers"] == 7
    assert 0 < found["share"] < found["worst_share"] <= 1
    assert f"most in {found['worst']}" in done.output.replace("\n", " ")
    assert "lie beyond their static scales" in done.output
