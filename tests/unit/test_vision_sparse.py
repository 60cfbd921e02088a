"""Training before a cut: what will go is pulled to nothing, what stays is left free, and then the cut is exact."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import RecipeError
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.vision.clusters import Graph
from compressor.vision.finetune import Training
from compressor.vision.images import read_data
from compressor.vision.l1 import L1
from compressor.vision.pixels import Pixels, Preprocess
from compressor.vision.ranking import RankingImages
from compressor.vision.selection import select, uniform
from compressor.vision.sparse import channels_that_go, shrink

CPU = torch.device("cpu")


def digits(folder: Path, channels: int = 1) -> Pixels:
    return Pixels(read_data(str(rare_digits(folder / "digits.npz"))).train, Preprocess(folder, channels))


def chosen(graph: Graph, images: Pixels) -> dict[str, torch.Tensor]:
    return select(graph, L1().score(graph, RankingImages(images, CPU)), uniform(graph.clusters, 0.5))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10),
    ).eval()  # fmt: skip


def test_channels_are_those_that_the_cut_takes(tmp_path: Path) -> None:
    model = tiny_classifier("resnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.arange(len(module.weight)).float()
    graph = Graph(model, torch.rand(2, 3, 32, 32))
    keep = chosen(graph, digits(tmp_path, 3))
    going = channels_that_go(graph, keep)
    graph.cut(keep)
    assert len(going) == 10
    for name, mask in going.items():
        stays = model.get_submodule(name).weight
        assert torch.equal((~mask).nonzero().flatten().float(), stays), name


def test_what_goes_is_gone_before_the_cut(tmp_path: Path) -> None:
    images, model = digits(tmp_path), small()
    graph = Graph(model, images[torch.arange(2)])
    keep = chosen(graph, images)
    masks = channels_that_go(graph, keep)
    done = shrink(graph, keep, images, Training(epochs=4, lr=0.02, batch=32, augment="none"), CPU)
    for name, mask in masks.items():
        norm = model.get_submodule(name)
        assert not norm.weight[mask].any()
        assert not norm.bias[mask].any()
        assert norm.weight[~mask].abs().min() > 0.5
    assert (done.going[1], len(done.history)) == (0, 4)
    assert done.staying[1] == pytest.approx(done.staying[0], rel=0.1)
    assert done.history[-1] < done.history[0]
    with torch.no_grad():
        before = model(images[torch.arange(50)])
        graph.cut(keep)
        torch.testing.assert_close(model(images[torch.arange(50)]), before, rtol=1e-4, atol=1e-5)


def test_a_penalty_takes_its_rate_from_a_scale_in_every_step(tmp_path: Path) -> None:
    images, model = digits(tmp_path), small()
    graph = Graph(model, images[torch.arange(2)])
    keep = chosen(graph, images)
    settings = Training(epochs=1, lr=1e-9, batch=len(images), momentum=0, weight_decay=0)  # the loss moves nothing
    done = shrink(graph, keep, images, settings, CPU, strength=3e8)
    assert done.strength == 3e8
    assert done.going == pytest.approx((1.0, 0.7))
    assert done.staying == pytest.approx((1.0, 1.0))


def test_models_without_batch_normalization_are_told_so(tmp_path: Path) -> None:
    images = digits(tmp_path, 3)
    graph = Graph(tiny_classifier("convnext"), torch.rand(2, 3, 32, 32))
    keep = {cluster.name: torch.arange(1) for cluster in graph.clusters}
    with pytest.raises(RecipeError, match="no channel that goes passes any"):
        shrink(graph, keep, images, Training(epochs=1), CPU)
