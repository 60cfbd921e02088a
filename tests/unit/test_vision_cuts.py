"""Removing channels: what is left computes what it must, and comes back from a description."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.checkpoint.cuts import apply_cuts, cuts_of, difference, widths
from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.testing.images import tiny_classifier
from compressor.vision.budget import Macs, Sensitivity, kept_counts, sensitive_for, uniform_for
from compressor.vision.clusters import Graph, logits_of
from compressor.vision.complexity import count_macs, count_parameters
from compressor.vision.finetune import recalibrate
from compressor.vision.images import ImageSet
from compressor.vision.pixels import Pixels, Preprocess
from compressor.vision.selection import select, uniform

KINDS = ("resnet", "bottleneck", "regnet", "mobilenet", "convnext")
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def halve(model: nn.Module, seed: int = 0) -> tuple[Graph, dict[str, list[int]]]:
    graph = Graph(model, EXAMPLE)
    generator = torch.Generator().manual_seed(seed)
    scores = {c.name: torch.rand(c.size, generator=generator) for c in graph.clusters}
    return graph, graph.cut(select(graph, scores, uniform(graph.clusters, 0.5)))


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_every_cluster_goes_and_the_classes_stay(kind: str) -> None:
    model = tiny_classifier(kind)
    before = widths(model)
    macs, parameters = count_macs(model, EXAMPLE), count_parameters(model)
    graph, kept = halve(model)
    with torch.no_grad():
        assert model(EXAMPLE).logits.shape == (2, 10)
    assert count_macs(model, EXAMPLE) < 0.55 * macs
    assert count_parameters(model) < 0.55 * parameters
    assert {producer.layer for c in graph.clusters for producer in c.producers} == set(kept)
    for layer, channels in kept.items():
        assert len(model.get_submodule(layer).weight) == len(channels) == before[layer].tensors["weight"][0] // 2


@pytest.mark.parametrize("kind", KINDS)
def test_description_makes_the_same_shapes_again(kind: str) -> None:
    model, twin = tiny_classifier(kind), tiny_classifier(kind)
    before = widths(model)
    halve(model)
    cuts = json.loads(json.dumps(difference(before, model)))
    apply_cuts(twin, cuts_of({"quantization_config": {"cuts": cuts}}))
    assert widths(twin) == widths(model)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(EXAMPLE).logits, model(EXAMPLE).logits)


class Residual(nn.Module):
    """Convolutions with normalization around a residual sum, a depthwise one, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.outer(self.depth(self.inner(x))))
        return self.head(self.pool(x).flatten(1))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return model


class Dense(nn.Module):
    """Features that are kept and joined by later ones, each joint normalized as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (8, 12, 16)])
        self.grow = nn.ModuleList([nn.Conv2d(width, 4, 3, padding=1) for width in (8, 12)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, grow in zip(self.norms, self.grow, strict=False):
            x = torch.cat((x, grow(torch.relu(norm(x)))), 1)
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


def test_joined_features_are_cut_where_they_lie() -> None:
    torch.manual_seed(0)
    model = Dense().eval().requires_grad_(False)
    graph = Graph(model, EXAMPLE)
    assert {c.name: c.size for c in graph.clusters} == {"stem": 8, "grow.0": 4, "grow.1": 4}
    cluster = next(c for c in graph.clusters if c.name == "grow.0")
    assert {norm.layer: norm.places.tolist() for norm in cluster.norms} == {
        "norms.1": [8, 9, 10, 11],
        "norms.2": [8, 9, 10, 11],
    }
    weights = model.grow[0].weight[torch.tensor([0, 3])].clone()
    kept = {"grow.0": torch.tensor([0, 3]), "stem": torch.arange(1, 8)}
    macs = Macs(graph).of({"stem": 7, "grow.0": 2, "grow.1": 4})
    graph.cut(kept)
    assert count_macs(model, EXAMPLE) == macs
    assert torch.equal(model.grow[0].weight, weights[:, 1:])
    assert model.norms[2].num_features == model.head.in_features == 13


def test_ties_of_a_plain_module() -> None:
    graph = Graph(residual(), EXAMPLE)
    members = {c.name: set(c.members) for c in graph.clusters}
    assert set(map(frozenset, members.values())) == {
        frozenset({"stem.0", "outer.0"}),
        frozenset({"inner.0", "depth.0"}),
    }
    assert {c.inner for c in graph.clusters if "depth.0" in c.members} == {True}
    assert not any("head" in c.members for c in graph.clusters)


def test_removing_channels_that_give_nothing_changes_nothing() -> None:
    model = residual()
    graph = Graph(model, EXAMPLE)
    keep = {c.name: torch.tensor([i for i in range(c.size) if i % 3]) for c in graph.clusters}
    for part in (model.stem, model.inner, model.depth, model.outer):
        gone = torch.arange(0, len(part[1].weight), 3)
        part[1].weight[gone] = 0
        part[1].bias[gone] = 0
    expected = model(EXAMPLE)
    graph.cut(keep)
    assert model.stem[0].out_channels == 5
    assert model.depth[0].groups == 8
    assert model.head.in_features == 20
    torch.testing.assert_close(model(EXAMPLE), expected, rtol=0, atol=1e-6)


def test_removed_is_what_masked_computes() -> None:
    masked, model = residual(), residual()
    graph = Graph(model, EXAMPLE)
    name = next(c.name for c in graph.clusters if "inner.0" in c.members)
    keep = torch.tensor([0, 2, 3, 7, 11])
    mask = torch.zeros(12)
    mask[keep] = 1
    for part in (masked.inner, masked.depth):
        part.register_forward_hook(lambda _, __, output: output * mask[:, None, None])
    graph.cut({name: keep})
    torch.testing.assert_close(model(EXAMPLE), masked(EXAMPLE), rtol=0, atol=1e-5)


def test_skipped_layers_stay_whole() -> None:
    model = residual()
    graph = Graph(model, EXAMPLE, ["stem*"])
    assert {member for c in graph.clusters for member in c.members} == {"inner.0", "depth.0"}
    with pytest.raises(RecipeError, match="matches no layer"):
        Graph(model, EXAMPLE, ["nothing*"])


def test_models_without_filters_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(UnsupportedError, match="no convolution"):
        Graph(model, EXAMPLE)
    with pytest.raises(UnsupportedError, match="without logits"):
        logits_of({"a": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_macs_of_widths_are_those_of_the_cut_model(kind: str) -> None:
    model = tiny_classifier(kind)
    graph = Graph(model, EXAMPLE)
    macs = Macs(graph)
    assert macs.dense == count_macs(model, EXAMPLE)
    ratios = {c.name: 0.1 * (index % 8) for index, c in enumerate(graph.clusters)}
    scores = {c.name: torch.zeros(c.size) for c in graph.clusters}
    graph.cut(select(graph, scores, ratios))
    assert macs.of(kept_counts(graph, ratios, 1)) == count_macs(model, EXAMPLE)


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_budget_is_met_and_nearly_used(share: float) -> None:
    model = tiny_classifier("resnet")
    graph = Graph(model, EXAMPLE)
    macs = Macs(graph)
    flat = Sensitivity({c.name: (0.1, 0.2, 0.3) for c in graph.clusters})
    for ratios in (
        uniform_for(graph, share, lambda strength: uniform(graph.clusters, min(strength, 0.999)), 1),
        sensitive_for(graph, share, flat, 1),
    ):
        assert share - 0.12 < macs.of(kept_counts(graph, ratios, 1)) / macs.dense <= share


def test_sensitive_layers_are_spared() -> None:
    graph = Graph(tiny_classifier("resnet"), EXAMPLE)
    first = graph.clusters[0].name
    rises = {c.name: (0.1, 0.2, 0.3) for c in graph.clusters}
    equal = sensitive_for(graph, 0.5, Sensitivity(rises), 1)
    spared = sensitive_for(graph, 0.5, Sensitivity({**rises, first: (9.0, 18.0, 27.0)}), 1)
    assert equal[first] > spared[first] == 0


def test_sensitivity_between_its_levels() -> None:
    found = Sensitivity({"a": (0.2, 0.1, 1.0)})
    assert found.at("a", 0.125) == pytest.approx(0.1)
    assert found.at("a", 0.5) == pytest.approx(0.2)  # never less than at a smaller ratio
    assert found.at("a", 0.85) == pytest.approx(1.0 + 2 * 0.8 * 0.1 / 0.25)


def test_budget_out_of_reach_is_refused() -> None:
    graph = Graph(tiny_classifier("resnet"), EXAMPLE)
    with pytest.raises(RecipeError, match="the narrowest cut still costs"):
        uniform_for(graph, 1e-4, lambda strength: uniform(graph.clusters, min(strength, 0.999)), 1)
    with pytest.raises(RecipeError, match="the narrowest cut still costs"):
        sensitive_for(graph, 1e-4, Sensitivity({c.name: (0, 0, 0) for c in graph.clusters}), 1)


def test_macs_are_the_closed_form() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(32 * 32**2, 7),
    )
    assert count_macs(model, EXAMPLE) == 32**2 * 9 * (3 * 16 + 4 * 32) + 32 * 32**2 * 7


def test_recalibration_computes_the_statistics_of_the_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    images = ImageSet(
        lambda index: torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(index)).byte().numpy(),
        torch.zeros(128, dtype=torch.long),
        ("a",),
    )
    pixels = Pixels(images, Preprocess(Path("nowhere"), 3))
    assert recalibrate(model, pixels, torch.arange(128), torch.device("cpu")) == 1
    values = model[0](pixels[torch.arange(128)])
    torch.testing.assert_close(model[1].running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not model[1].training
    assert model[1].momentum == 0.1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sizes": {"out_channels": 99}, "tensors": {}}, "cannot become 99"),
        ({"sizes": {"out_channels": 0}, "tensors": {}}, "cannot become 0"),
        ({"sizes": {"weight": 3}, "tensors": {}}, "cannot become 3"),
        ({"sizes": {}, "tensors": {"weight": [16, 3, 7]}}, "cannot become"),
        ({"sizes": {}}, "no sizes and tensors"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(entry: dict, message: str) -> None:
    model = tiny_classifier("resnet")
    name = "resnet.embedder.embedder.convolution"
    with pytest.raises(CheckpointError, match=message):
        apply_cuts(model, {"version": 1, "modules": {name: entry}})
    with pytest.raises(CheckpointError, match="no module"):
        apply_cuts(model, {"version": 1, "modules": {"nothing": entry}})
    with pytest.raises(CheckpointError, match="version 2"):
        cuts_of({"quantization_config": {"cuts": {"version": 2, "modules": {}}}})
