"""Weights and inputs on grids of powers, from the command to the loaded result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import compressor
from compressor.check import check
from compressor.errors import RecipeError
from compressor.inputs import RoundPower
from compressor.report import RunReport
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text


def run(root: Path, **more: Any) -> tuple[RunReport, Path]:
    source = root / "source"
    if not source.exists():
        save_checkpoint(models.tiny_llama(layers=2), source)
    wanted: dict[str, Any] = {"method": "nupes", "format": "power4", "n_samples": 6, "seq_len": 32, **more}
    out = root / f"out-{len(list(root.iterdir()))}"
    return compressor.quantize(str(source), output=out, data=str(write_text(root / "text.txt")), **wanted), out


def stored(out: Path, suffix: str) -> dict[str, float]:
    """Return module -> the one value of this suffix, of all files of a checkpoint."""
    found: dict[str, float] = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, not a mapping
                if key.endswith(f".{suffix}"):
                    found[key.removesuffix(f".{suffix}")] = float(file.get_tensor(key))
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"inputs": "power8-token", "options": {"learn": False}},
        {"inputs": "power6-tensor", "options": {"learn": False}},
        {"inputs": "power8-tensor", "options": {"iters": 8, "lr_exponent": 0.05}},
        {"inputs": "power4-token", "method": "gptq"},
    ],
    ids=["searched", "static", "learned", "gptq"],
)
def test_inputs_take_over_the_exponents_of_their_weights(more: dict[str, Any], tmp_path: Path) -> None:
    report, out = run(tmp_path, **more)
    assert report.verification["ok"]
    errors = [row.input_error for row in report.rows if row.input_error is not None]
    assert all(0 < error < 0.5 for error in errors)
    assert errors or more["options"] == {"learn": False}, "only a run without data does not know them"
    of_weights, of_inputs = stored(out, "weight_exponent"), stored(out, "input_exponent")
    assert of_inputs == of_weights
    assert len(set(of_weights.values())) > 3, "one per layer"
    assert set(stored(out, "input_scale")) == (set(of_inputs) if "tensor" in more["inputs"] else set())
    assert check(out, quick=True).ok
    model = compressor.load(out)
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        rounded = model(tokens).logits
    assert torch.isfinite(rounded).all()
    assert not torch.equal(rounded, unrounded(out, tokens))


def unrounded(out: Path, tokens: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundPower, "apply", lambda self, x: x)
        with torch.no_grad():
            return compressor.load(out)(tokens).logits  # type: ignore[no-any-return]


def test_learning_sees_inputs_at_the_exponent_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the exponent of a layer's weights is learned, its inputs are rounded with it."""
    seen: set[float] = set()
    apply = RoundPower.apply

    def watch(self: RoundPower, x: torch.Tensor) -> torch.Tensor:
        seen.add(round(float(self.exponent), 3))
        return apply(self, x)

    monkeypatch.setattr(RoundPower, "apply", watch)
    _, out = run(tmp_path, inputs="power8-token", options={"iters": 8, "lr_exponent": 0.05})
    moved = {round(value, 3) for value in stored(out, "weight_exponent").values()}
    assert moved <= seen
    assert len(seen) > 2 * len(moved), "the exponents before the last ones were seen as well"


def test_weights_without_an_exponent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="power8-token takes over the exponent of weights, which int4 has not"):
        run(tmp_path, method="rtn", format="int4", inputs="power8-token")
