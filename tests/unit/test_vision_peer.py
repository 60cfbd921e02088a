"""Torch-Pruning as a way to cut beside ours: the same share goes, and its importances decide which."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.errors import RecipeError
from compressor.evals.bench.table import TABLES
from compressor.evals.bench.vision_table import read_vision_table
from compressor.testing.images import tiny_classifier
from compressor.vision.complexity import count_macs, count_parameters
from compressor.vision.experiment import Arm, described
from compressor.vision.images import ImageSet
from compressor.vision.peer import IMPORTANCES, cut_with_torch_pruning
from compressor.vision.pixels import Pixels, Preprocess


def pixels() -> Pixels:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = torch.arange(12) % 10
    return Pixels(ImageSet(lambda index: images[index], labels, tuple("0123456789")), Preprocess(Path("nowhere"), 3))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_half_of_the_channels_go_and_classes_stay(importance: str) -> None:
    images = pixels()
    example = images[torch.arange(2)]
    original = tiny_classifier("resnet")
    models = [copy.deepcopy(original) for _ in range(2)]
    for model in models:
        cut_with_torch_pruning(model, importance, 0.5, images, example, seed=1)
    cut, again = models
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), "the same seed cuts the same"
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert count_parameters(cut) < 0.4 * count_parameters(original)
    assert count_macs(cut, example) < 0.4 * count_macs(original, example)
    with torch.no_grad():
        logits = cut(example).logits
    assert logits.shape == original(example).logits.shape
    assert torch.isfinite(logits).all()


def test_the_weakest_channels_go() -> None:
    images = pixels()
    model = tiny_classifier("resnet")
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    inner = model.resnet.encoder.stages[0].layers[0].layer[0]
    with torch.no_grad():
        inner.convolution.weight[1::2] *= 100  # channels inside a block: nothing else is tied to them
    kept = inner.convolution.weight[1::2].clone()
    cut_with_torch_pruning(model, "l1", 0.5, images, images[torch.arange(2)], seed=0)
    now = inner.convolution.weight
    assert now.shape[0] == kept.shape[0]
    assert float(now.abs().mean()) == pytest.approx(float(kept.abs().mean()), rel=0.2)
    assert layer.weight.shape[0] > 0


def test_unknown_importance() -> None:
    images = pixels()
    with pytest.raises(RecipeError, match="no importance 'magic'"):
        cut_with_torch_pruning(tiny_classifier("resnet"), "magic", 0.5, images, images[torch.arange(2)], 0)


def test_arms_without_a_tool_are_described_as_before() -> None:
    arm = {"name": "l1", "method": "l1", "options": {}, "sparsity": 0.5, "finetune": {}}
    assert described(Arm.model_validate(arm)) == arm
    table = read_vision_table(TABLES / "peers-filters.yaml")
    tools = [arm for arm in table.spec(0, "x")["arms"] if "tool" in arm]
    assert {arm["method"] for arm in tools} <= set(IMPORTANCES)
    assert len(tools) == 6
