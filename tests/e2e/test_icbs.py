"""iCBS on tiny language models: gradients against autograd, the run, its state, and a run that is cut off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import compressor
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import CheckpointError, RecipeError
from compressor.planner import make_plan
from compressor.pruner import prune_recipe
from compressor.pruning import gradients, icbs
from compressor.pruning.gradients import MaskedModel
from compressor.pruning.mask_file import read_masks
from compressor.report import RunReport, Silent
from compressor.runtime import load
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

SMALL = {"window": 16, "samples": 24, "held_back": 12, "block": 512, "restarts": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_text(folder.parent / "text.txt")
    return save_checkpoint(models.tiny_llama(kv_heads=2).to(torch.bfloat16), folder)


def prune(source: Path, out: Path, *, sweeps: int = 2, **how: object) -> RunReport:
    options = {**SMALL, "sweeps": sweeps, **how.pop("options", {})}  # type: ignore[dict-item]
    how = {"sparsity": 0.5, **how} if "pattern" not in how else how
    report = compressor.prune(
        str(source),
        method="icbs",
        output=out,
        data=str(source.parent / "text.txt"),
        n_samples=16,
        seq_len=64,
        options=options,
        **how,  # type: ignore[arg-type]
    )
    assert report.verification["ok"]
    return report


def curve(out: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((out / icbs.CURVE).read_text())["curve"]
    return found


@pytest.mark.parametrize("target", ["text", "original"])
def test_gradients_of_single_samples_are_those_of_autograd(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: gradients.Target
) -> None:
    """Block by block, in parts, behind masks: the same as one backward pass of the whole model per sample."""
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 24)  # two samples at once
    opened, skeleton = Source.open(source), Skeleton.build(source)
    blocks = BlockSequence.find(skeleton.model)
    recipe = prune_recipe(
        str(source),
        method="magnitude",
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
    tokens = torch.randint(0, 320, (6, 12), generator=rng)
    masks = {layer.ref.name: torch.rand(layer.ref.shape, generator=rng) < 0.5 for layer in plan.compressed}
    masked = MaskedModel(plan, opened, skeleton, blocks, tmp_path, target=target)
    losses, layers = masked.backward(tokens, masks.__getitem__)
    found = {layer.ref.name: (w0, gradient) for layer, w0, gradient in layers}
    assert found.keys() == masks.keys()
    assert not list(tmp_path.glob("*.bin")), "hidden states were left on the disk"

    whole = load(source)
    with torch.no_grad():
        aims = whole(tokens).logits.log_softmax(-1)
    parameters = dict(whole.named_parameters())
    for name, mask in masks.items():
        parameters[name].data *= mask
        parameters[name].requires_grad_()
    for sample in range(6):
        logits = whole(tokens[sample : sample + 1]).logits[0]
        if target == "text":
            loss = functional.cross_entropy(logits[:-1], tokens[sample, 1:])
        else:
            loss = (aims[sample].exp() * (aims[sample] - logits.log_softmax(-1))).sum(-1).mean()
        assert float(losses[sample]) == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.autograd.grad(loss, [parameters[name] for name in masks])
        for name, gradient in zip(masks, expected, strict=True):
            rows, columns = gradient.shape
            index = torch.randint(0, rows * columns, (50,), generator=rng)
            single = found[name][1].columns(index)[sample]
            assert torch.allclose(single, gradient.flatten()[index], rtol=1e-3, atol=1e-6), name
    for name, (w0, gradient) in found.items():
        assert torch.allclose(
            gradient.mean(),
            torch.stack([gradient.columns(torch.arange(w0.numel()))[s].view(w0.shape) for s in range(6)]).mean(0),
            rtol=1e-3,
            atol=1e-6,
        )
        assert torch.equal(w0, load_file(source / "model.safetensors")[name].float())
    for _ in range(2):  # the second time with what was kept of the original
        assert torch.allclose(masked.losses(tokens, masks.__getitem__), losses, rtol=1e-5)
    whole_losses = masked.losses(tokens, lambda name: torch.ones_like(masks[name]))
    assert bool((whole_losses.abs() < 1e-6).all()) == (target == "original")


@pytest.mark.parametrize(
    ("start", "target"), [("wanda", "text"), ("magnitude", "text"), ("random", "text"), ("wanda", "original")]
)
def test_the_loss_falls_and_kept_weights_are_the_original_ones(
    source: Path, tmp_path: Path, start: str, target: str
) -> None:
    report = prune(source, tmp_path / "out", sweeps=3, options={"start": start, "target": target})
    losses = [entry["held_back"] for entry in curve(tmp_path / "out")]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True), "the guard lets no sweep make it worse"
    assert losses[-1] < (losses[0] - 0.05 if target == "text" else 0.9 * losses[0])
    assert all(entry["energy"] <= 0 for entry in curve(tmp_path / "out")[1:])
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    states, _ = read_masks(tmp_path / "out" / icbs.STATE)
    for row in report.rows:
        if row.action == "pruned":
            keep = states[row.name].keep
            assert torch.equal(after[row.name][keep], before[row.name][keep])
            assert not after[row.name][~keep].any()
            assert int((~keep).sum()) == keep.numel() // 2, "the number of pruned weights changed"
    assert any("held-back loss" in event for event in report.events)


def test_patterns_stay_patterns(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out", pattern="2:4", sweeps=2)
    losses = [entry["held_back"] for entry in curve(tmp_path / "out")]
    assert losses[-1] < losses[0]
    for name, state in read_masks(tmp_path / "out" / icbs.STATE)[0].items():
        assert (state.keep.unflatten(1, (-1, 4)).sum(-1) == 2).all(), name


def test_a_run_goes_on_from_its_state(source: Path, tmp_path: Path) -> None:
    """Two sweeps and then two more are the four sweeps of one run, bit for bit."""
    prune(source, tmp_path / "two", sweeps=2)
    prune(source, tmp_path / "more", sweeps=2, options={"start": str(tmp_path / "two" / icbs.STATE)})
    prune(source, tmp_path / "four", sweeps=4)
    more, four = tree_hash(tmp_path / "more"), tree_hash(tmp_path / "four")
    assert more["model.safetensors"] == four["model.safetensors"]
    kept = [{key: value for key, value in entry.items() if key != "seconds"} for entry in curve(tmp_path / "more")]
    assert kept == [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve(tmp_path / "four")]
    assert curve(tmp_path / "two") == curve(tmp_path / "more")[:3]


class CutOff(Exception):
    pass


class Cutting(Silent):
    """Stops the run at the n-th sweep."""

    def __init__(self, sweep: int) -> None:
        self.sweep = sweep

    def stage(self, name: str) -> None:
        if name.startswith(f"sweep {self.sweep} "):
            raise CutOff


def test_a_cut_off_search_continues_and_writes_the_same(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CutOff):
        prune(source, tmp_path / "cut", sweeps=3, progress=Cutting(2))
    assert not (tmp_path / "cut" / "config.json").exists()
    prune(source, tmp_path / "cut", sweeps=3)
    prune(source, tmp_path / "whole", sweeps=3)
    ignored = {icbs.CURVE}  # it holds seconds
    cut, whole = (
        {k: v for k, v in tree_hash(tmp_path / name).items() if k not in ignored} for name in ("cut", "whole")
    )
    assert cut == whole


def test_what_cannot_start_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a file"):
        prune(source, tmp_path / "a", options={"start": "wandaa"})
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="masks"):
        prune(source, tmp_path / "b", options={"start": str(tmp_path / "junk")})
    with pytest.raises(RecipeError, match="windows"):
        prune(source, tmp_path / "c", options={"samples": 1000})
    prune(source, tmp_path / "half", sweeps=0)
    with pytest.raises(CheckpointError, match="asked for is 70"):
        prune(source, tmp_path / "d", sparsity=0.7, options={"start": str(tmp_path / "half" / icbs.STATE)})
    elsewhere = {"start": str(tmp_path / "half" / icbs.STATE), "target": "original"}
    with pytest.raises(CheckpointError, match="target=text, asked for is original"):
        prune(source, tmp_path / "f", options=elsewhere)
    other = save_checkpoint(models.tiny_llama(layers=1).to(torch.bfloat16), tmp_path / "other")
    (tmp_path / "text.txt").write_text((source.parent / "text.txt").read_text())
    with pytest.raises(CheckpointError, match="do not fit"):
        prune(other, tmp_path / "e", options={"start": str(tmp_path / "half" / icbs.STATE)})


def test_no_sweeps_is_the_starting_mask(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "icbs", sweeps=0)
    compressor.prune(
        str(source),
        method="wanda",
        sparsity=0.5,
        output=tmp_path / "wanda",
        data=str(source.parent / "text.txt"),
        n_samples=16,
        seq_len=64,
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("icbs", "wanda"))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
