"""Derivatives by gates against closing the gate a little, and what classes weigh."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.testing.images import tiny_classifier
from compressor.vision.budget import measure_sensitivity
from compressor.vision.clusters import Graph
from compressor.vision.images import ImageSet
from compressor.vision.options import TaylorOptions
from compressor.vision.pixels import Pixels, Preprocess
from compressor.vision.ranking import RankingImages
from compressor.vision.taylor import Taylor, gate_derivatives

CPU = torch.device("cpu")


def pixels(labels: list[int]) -> Pixels:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    found = ImageSet(lambda index: images[index], torch.tensor(labels), tuple("0123456789"))
    return Pixels(found, Preprocess(Path("nowhere"), 3))


@pytest.mark.parametrize("kind", ["resnet", "regnet", "mobilenet", "convnext"])
def test_derivative_is_that_of_a_gate(kind: str) -> None:
    model = tiny_classifier(kind).double()
    images = pixels([0, 3, 7])
    images[torch.arange(3)]
    images._cache = images._cache.double()
    graph = Graph(model, images[torch.arange(2)])
    found = gate_derivatives(graph, RankingImages(images, CPU, batch=2))
    step = 1e-5
    for cluster in graph.clusters[:3]:
        channel = cluster.size // 2
        losses = []
        for gate in (1 + step, 1 - step):
            handles = []
            for place in cluster.norms or cluster.producers:
                factor = torch.ones(cluster.size, dtype=torch.double)
                factor[channel] = gate
                factor = factor[place.channels]
                last = isinstance(model.get_submodule(place.layer), nn.Linear)
                factor = factor if last else factor[:, None, None]
                hook = model.get_submodule(place.layer).register_forward_hook(lambda _, __, out, f=factor: out * f)
                handles.append(hook)
            with torch.no_grad():
                logits = model(images[torch.arange(3)]).logits
            losses.append(nn.functional.cross_entropy(logits, images.labels, reduction="none"))
            for handle in handles:
                handle.remove()
        expected = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(found[cluster.name][:, channel], expected.float(), rtol=2e-3, atol=1e-6)


def test_classes_weigh_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = torch.tensor([[1.0, 0, 0]] * 8 + [[0, 2.0, 1]])
    monkeypatch.setattr("compressor.vision.taylor.gate_derivatives", lambda *_: {"c": changes})
    images = RankingImages(pixels([0] * 8 + [1]), CPU)
    scored = {c: Taylor(TaylorOptions(classes=c)).score(None, images)["c"].tolist() for c in ("mean", "all", "max")}
    assert scored["mean"] == pytest.approx([0, 1, 0])
    assert scored["all"] == pytest.approx([1, (4 - 1) / 7, 0])
    assert scored["max"] == pytest.approx([0, 1, 0])


def test_sensitivity_leaves_the_model_alone_and_finds_the_layer_that_matters() -> None:
    model = tiny_classifier("resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = pixels([0, 1, 2, 3] * 8)
    graph = Graph(model, images[torch.arange(2)])
    scores = {c.name: torch.arange(c.size).float() for c in graph.clusters}
    found = measure_sensitivity(graph, scores, images, CPU)
    assert set(found.rise) == {c.name for c in graph.clusters}
    assert len({rise for rises in found.rise.values() for rise in rises}) > len(graph.clusters)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
