"""Pruning by gradients on tiny models: experts under iCBS and M-FAC, and M-FAC's steps the whole way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedModel

import compressor
import compressor.verify
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import RecipeError
from compressor.planner import make_plan
from compressor.pruner import prune_recipe
from compressor.pruning import gradients
from compressor.pruning.gradients import MaskedModel
from compressor.report import RunReport, Silent
from compressor.ship.card import make_card
from compressor.ship.origin import origin_of
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

SEARCH = {"window": 16, "samples": 12}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify here: that a fresh process does is what other tests are about."""
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.txt"))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    return save_checkpoint(model.to(torch.bfloat16), folder)


def prune(source: Path, out: Path, text: str, method: str, progress: Silent | None = None, **how: object) -> RunReport:
    report = compressor.prune(
        str(source),
        output=out,
        data=text,
        method=method,
        n_samples=8,
        seq_len=64,
        progress=progress,
        **how,  # type: ignore[arg-type]
    )
    assert report.verification["ok"]
    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: value for name, value in found.items() if value.ndim == 2 and ("proj" in name or ".experts." in name)}


@pytest.mark.parametrize("kind", ["tiny_mixtral", "tiny_qwen2_moe"])
def test_experts_gradients_are_those_of_autograd(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts, shared experts and the layers around them, sample by sample, behind masks."""
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 20)  # two samples at once
    source = save_checkpoint(getattr(models, kind)(), tmp_path / "source")
    opened, skeleton = Source.open(source), Skeleton.build(source)
    blocks = BlockSequence.find(skeleton.model)
    recipe = prune_recipe(
        str(source),
        method="icbs",
        sparsity=0.5,
        pattern=None,
        format=None,
        group_size=None,
        skip=(),
        options={},
        seed=0,
        trust_remote_code=False,
    )
    plan = make_plan(recipe, opened, skeleton, blocks)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 320, (4, 10), generator=rng)
    masks = {layer.ref.name: torch.rand(layer.ref.shape, generator=rng) < 0.7 for layer in plan.compressed}
    assert sum("experts." in name for name in masks) >= 4 * 3
    losses, layers = MaskedModel(plan, opened, skeleton, blocks, tmp_path).backward(tokens, masks.__getitem__)
    found = {layer.ref.name: (layer, gradient) for layer, _, gradient in layers}
    assert found.keys() == masks.keys()

    whole = compressor.load(source)
    parameters = dict(whole.named_parameters())
    for name, (layer, _) in found.items():
        layer.ref.where.of(parameters[layer.ref.param].data).mul_(masks[name])
    whole.requires_grad_(True)
    for sample in range(4):
        logits = whole(tokens[sample : sample + 1]).logits[0, :-1]
        loss = functional.cross_entropy(logits, tokens[sample, 1:])
        assert float(losses[sample]) == pytest.approx(loss.item(), rel=1e-4)
        whole.zero_grad()
        loss.backward()
        for name, (layer, gradient) in found.items():
            stacked = parameters[layer.ref.param].grad
            assert stacked is not None
            expected = layer.ref.where.of(stacked)
            assert len(gradient.inputs) == len(gradient.outputs) == 4, name
            got = gradient.columns(torch.arange(expected.numel()))[sample].view(expected.shape)
            torch.testing.assert_close(
                got, expected, rtol=2e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("method", ["icbs", "m-fac", "magnitude", "sparsegpt"])
def test_experts_are_pruned(method: str, tmp_path: Path, text: str) -> None:
    source = saved(models.tiny_qwen2_moe(), tmp_path / "source")
    options = {"icbs": {**SEARCH, "held_back": 4, "block": 256, "sweeps": 2}, "m-fac": SEARCH}.get(method, {})
    report = prune(source, tmp_path / "out", text, method, sparsity=0.5, options=options)
    before, after = weights(source), weights(tmp_path / "out")
    experts = [name for name in after if ".experts." in name]
    assert len(experts) == 4 * 3
    for name in experts:
        assert float((after[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
        if method in ("icbs", "magnitude"):
            assert torch.equal(after[name][after[name] != 0], before[name][after[name] != 0])
    if method == "icbs":
        assert any("held-back loss" in event for event in report.events)
        start = tmp_path / "start"
        prune(source, start, text, "wanda", sparsity=0.5)
        assert any(not torch.equal(after[name] != 0, weights(start)[name] != 0) for name in experts), (
            "no expert changed"
        )


@pytest.mark.parametrize("how", [{"sparsity": 0.5, "options": {"steps": 2}}, {"pattern": "2:4"}])
def test_mfac_moves_what_stays(how: dict[str, object], tmp_path: Path, text: str) -> None:
    source = saved(models.tiny_llama(kv_heads=2), tmp_path / "source")
    rest = {key: value for key, value in how.items() if key != "options"}
    options = {**SEARCH, **how.get("options", {})}  # type: ignore[dict-item]
    report = prune(source, tmp_path / "out", text, "m-fac", options=options, **rest)
    before, after = weights(source), weights(tmp_path / "out")
    moved = 0
    for name, weight in after.items():
        zeros = weight == 0
        assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.01), name
        if "pattern" in how:
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        moved += int((weight != before[name])[~zeros].sum())
    assert moved > 100
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert any(event.startswith("m-fac: loss") for event in report.events)
    card = make_card(tmp_path / "out", "me/sparse", origin_of(tmp_path / "out"))
    amount = "--pattern 2:4" if "pattern" in how else "--sparsity 0.5"
    assert f"compress prune source --method m-fac {amount} --option" in card
    assert "layers' weights are zero" in card
    assert "- compressed-tensors\n" not in card


class CutOff(Exception):
    """Stands for a kill."""


class Cutting(Silent):
    """Cuts the run off when a stage of this name begins."""

    def __init__(self, at: str) -> None:
        self.at, self.told = at, []  # type: ignore[var-annotated]

    def stage(self, name: str) -> None:
        self.told.append(name)
        if name.startswith(self.at):
            raise CutOff


def test_a_cut_off_run_goes_on_behind_its_last_step(tmp_path: Path, text: str) -> None:
    source = saved(models.tiny_llama(kv_heads=2), tmp_path / "source")
    options = {**SEARCH, "steps": 3}
    prune(source, tmp_path / "whole", text, "m-fac", options=options)
    with pytest.raises(CutOff):
        prune(source, tmp_path / "cut", text, "m-fac", options=options, progress=Cutting("step 3 of 3: block"))
    watching = Cutting("never")
    prune(source, tmp_path / "cut", text, "m-fac", options=options, progress=watching)
    assert next(name for name in watching.told if name.startswith("step")).startswith("step 3 of 3: gradients")
    assert tree_hash(tmp_path / "cut") == tree_hash(tmp_path / "whole")
    few = {**options, "samples": 40}
    with pytest.raises(RecipeError, match="40 windows of 16 tokens"):
        prune(source, tmp_path / "few", text, "m-fac", options=few)
