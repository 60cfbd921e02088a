"""Tokens per expert: counted, topped up from a reserve and by force, and an error when there are too few."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import compressor
from compressor.api import calibrate, prepare
from compressor.calibration.coverage import Coverage, ForcedRouting
from compressor.errors import CompressorError, CoverageError, RecipeError
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import RunReport
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

N_SAMPLES, SEQ_LEN = 4, 32


def skewed(model: PreTrainedModel) -> PreTrainedModel:
    """Make the router of every layer never choose expert 3 by itself, and expert 2 hardly ever."""
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            # Inputs of the router have mean zero, so no direction is safe: two experts of equal rows share all tokens.
            param[0] = param[0] * 40
            param[1] = -param[0]
            param[2], param[3] = param[2] * 1e-3, torch.zeros_like(param[3])
    return model


def run(model: PreTrainedModel, root: Path, **options: Any) -> RunReport:
    source = root / "source"
    if not source.exists():
        source.mkdir(parents=True)
        save_checkpoint(model, source)
        write_text(root / "text.txt")
    wanted = {"method": "gptq", "format": "int4", "group_size": 32, "output": root / "out"}
    data = {"data": str(root / "text.txt"), "n_samples": N_SAMPLES, "seq_len": SEQ_LEN}
    return compressor.quantize(str(source), **{**wanted, **data, **options})


def experts_of(report: RunReport) -> Iterator[tuple[str, int, int]]:
    """Yield name, routed tokens and all tokens of every expert's weight."""
    for row in report.rows:
        if ".experts." in row.name:
            assert row.routed is not None
            yield row.name, row.routed, row.tokens


def test_counts_are_those_of_the_router(tmp_path: Path) -> None:
    report = run(models.tiny_olmoe(), tmp_path, min_expert_tokens=0)
    by_layer: dict[str, int] = {}
    for name, routed, tokens in experts_of(report):
        assert routed == tokens
        if name.endswith("down_proj.weight"):
            layer = name.partition(".mlp")[0]
            by_layer[layer] = by_layer.get(layer, 0) + routed
    assert set(by_layer.values()) == {N_SAMPLES * SEQ_LEN * 2}  # two experts a token
    assert len(by_layer) == 2


def test_experts_below_the_minimum_are_topped_up(tmp_path: Path) -> None:
    natural = {name: routed for name, routed, _ in experts_of(run(skewed(models.tiny_olmoe()), tmp_path))}
    least = min(natural.values())
    wanted = least + 10
    report = run(skewed(models.tiny_olmoe()), tmp_path, min_expert_tokens=wanted, output=tmp_path / "more")
    for name, routed, tokens in experts_of(report):
        # Each router's own choice is the same only in the first layer: later ones sit behind other weights.
        assert tokens == max(routed, wanted), name
        assert ".layers.0." not in name or routed == natural[name]
    assert any("topped up from" in event and f"fewer than {wanted} tokens" in event for event in report.events)
    units = [unit for unit in report.units if "experts_topped_up" in unit]
    assert len(units) == 2
    assert units[0]["expert_tokens_fewest"] < wanted
    assert sum(unit["experts_topped_up"] for unit in units) > 0


def test_forced_routing_fills_what_the_reserve_cannot(tmp_path: Path) -> None:
    model = models.tiny_olmoe()
    # A router that sends every token to experts 0 and 1: no further text would reach the others.
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            param.zero_()
    report = run(model, tmp_path, min_expert_tokens=20)
    counts = {name: (routed, tokens) for name, routed, tokens in experts_of(report)}
    unreached = {name for name, (routed, _) in counts.items() if routed == 0}
    assert len(unreached) == 2 * 2 * 3  # layers, experts, projections
    assert all(counts[name][1] == 20 for name in unreached)
    assert any("the router sends elsewhere" in event for event in report.events)
    assert not any("no calibration token reached it" in event for event in report.events)
    for name, weight in dequantized(tmp_path / "out"):
        if ".experts." in name:
            assert torch.isfinite(weight).all()
            assert weight.any()


@pytest.mark.parametrize("start", ["mse", "gptq"])
def test_experts_that_a_learning_method_cannot_learn_are_rounded_on_topped_up_statistics(
    start: str, tmp_path: Path
) -> None:
    model = models.tiny_olmoe()
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            param.zero_()  # everything goes to the same two experts
    options = {"iters": 1, "start": start}
    report = run(model, tmp_path, method="flexround", options=options, min_expert_tokens=20)
    rows = [row for row in report.rows if ".experts." in row.name]
    assert sorted((row.routed, row.tokens) for row in rows) == [(0, 20)] * 12 + [(N_SAMPLES * SEQ_LEN,) * 2] * 12
    assert all(row.output_error is not None for row in rows if not row.routed)
    assert [unit["expert_tokens_fewest"] for unit in report.units if "expert_tokens_fewest" in unit] == [0, 0]
    said = [event for event in report.events if "gptq rounded those" in event]
    unreached = sorted(
        {row.name.split(".experts.")[1][0] for row in rows if not row.routed and ".layers.0." in row.name}
    )
    assert [event.rpartition(": ")[2] for event in said] == [", ".join(f"{expert} (0)" for expert in unreached)] * 2
    assert sum("topped up from calibration tokens" in event for event in report.events) == 2
    assert report.verification["ok"]
    learned = dict(dequantized(tmp_path / "out"))
    for name, weight in learned.items():
        assert torch.isfinite(weight).all()
        assert ".experts." not in name or weight.any()
    run(model, tmp_path, method="gptq", min_expert_tokens=20, output=tmp_path / "gptq")
    by_gptq = dict(dequantized(tmp_path / "gptq"))
    first = [row.name for row in rows if not row.routed and ".layers.0." in row.name]
    assert all(torch.equal(learned[name], by_gptq[name]) for name in first)  # behind the same embeddings
    reached = [row.name for row in rows if row.routed and ".layers.0." in row.name]
    assert not any(torch.equal(learned[name], by_gptq[name]) for name in reached)


def test_the_default_is_half_a_percent() -> None:
    assert CalibrationSpec().expert_tokens == 82  # of 32 x 512
    assert CalibrationSpec(min_expert_tokens=0).expert_tokens == 0
    assert CalibrationSpec(n_samples=1, seq_len=2).expert_tokens == 1


def test_more_than_there_is_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there are 128 calibration tokens in all"):
        run(models.tiny_olmoe(), tmp_path, min_expert_tokens=N_SAMPLES * SEQ_LEN + 1)
    run(models.tiny_llama(), tmp_path / "dense", min_expert_tokens=10**6)  # says nothing about a model without experts


def test_static_scales_of_unreached_experts_come_from_topped_up_tokens(tmp_path: Path) -> None:
    model = models.tiny_olmoe()
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            param.zero_()
    report = run(model, tmp_path, method="rtn", format="int8", inputs="int8-tensor", min_expert_tokens=16)
    assert {row.inputs for row in report.rows if ".experts." in row.name} == {"int8-tensor"}
    loaded = compressor.load(tmp_path / "out")
    for index in (0, 1):
        for expert in range(4):
            layer = loaded.get_submodule(f"model.layers.{index}.mlp.experts.{expert}.down_proj")
            assert float(layer.input_scale) > 1e-5


def test_the_reserve_changes_neither_windows_nor_repeats_them(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_olmoe(), tmp_path / "source")
    data = str(write_text(tmp_path / "text.txt"))

    def windows(minimum: int) -> Any:
        spec = CalibrationSpec(data=data, n_samples=4, seq_len=32, min_expert_tokens=minimum)
        return calibrate(prepare(Recipe(model=str(source), method="gptq", calibration=spec), tmp_path / "out"))

    without, with_ = windows(0), windows(5)
    assert without.reserve is None
    assert torch.equal(without.tokens, with_.tokens)
    assert with_.reserve.shape == (4, 32)
    both = torch.cat([with_.tokens, with_.reserve])
    assert len(both.unique(dim=0)) == 8


def test_the_same_command_writes_the_same_bytes_and_another_minimum_another_digest(tmp_path: Path) -> None:
    digests = []
    for name, minimum in (("a", 20), ("b", 20), ("c", 21)):
        report = run(skewed(models.tiny_olmoe()), tmp_path, min_expert_tokens=minimum, output=tmp_path / name)
        digests.append((report.digest, report.files["model.safetensors"]))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


class Counting(nn.Module):
    """Stands for a stack of experts: takes rows, indices and weights."""

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return hidden


def test_forced_tokens_are_those_the_router_likes_best() -> None:
    generator = torch.Generator().manual_seed(0)
    stack, matrix = Counting(), torch.randn(4, 8, generator=generator)
    rows = torch.randn(30, 8, generator=generator)
    logits = rows @ matrix.T
    chosen = logits.topk(1).indices
    forced = ForcedRouting({("s", 2): 5}, {"s": stack}, {"s": lambda hidden: (hidden @ matrix.T).softmax(-1)})
    with forced.attached():
        for part, own in zip(rows.split(10), chosen.split(10), strict=True):
            stack(part, own, torch.ones_like(own))
    shares = logits.softmax(-1)[:, 2].masked_fill((chosen == 2).any(-1), -1)
    expected = rows[shares.topk(5).indices]
    assert torch.equal(forced.found()["s", 2], expected)


def test_counts_lacks_and_limits() -> None:
    coverage = Coverage(minimum=5)
    assert coverage.take(("s", 0), 3) == 3
    assert coverage.take(("s", 1), 9) == 9
    assert coverage.lacking() == {("s", 0): 2}
    coverage.from_reserve = True
    assert coverage.take(("s", 1), 4) == 0
    assert coverage.take(("s", 0), 1) == 1
    with pytest.raises(CoverageError, match="expert 0 has 4 calibration tokens, 5 are wanted") as caught:
        coverage.check()
    assert isinstance(caught.value, CompressorError)
    assert caught.value.exit_code == 7
    assert coverage.take(("s", 0), 4) == 1
    coverage.check()
    assert coverage.metrics()["expert_tokens_fewest"] == 3
    assert coverage.metrics()["experts_topped_up"] == 1
