"""iCBS on small networks in memory, with the orderings the method promises."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import RecipeError, UnsupportedError
from compressor.pruning.candidates import Choice
from compressor.pruning.masks import Pattern
from compressor.pruning.modules import ModuleSearch, allocate
from compressor.pruning.step import Settings

Batch = tuple[Tensor, Tensor]


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def data(n: int, seed: int) -> Batch:
    """Ten classes of 8 x 8 pictures: smooth prototypes under noise."""
    prototypes = functional.interpolate(
        torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(99)), size=(8, 8), mode="bilinear"
    )
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (n,), generator=rng)
    x = prototypes[y] + torch.randn(n, 1, 8, 8, generator=rng)
    return x, y


def trained(model: nn.Module, flat: bool, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        x, y = batch(step, 128, flat)
        loss = losses(model, (x, y)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def batch(seed: int, n: int, flat: bool) -> Batch:
    x, y = data(n, 1000 + seed)
    return (x.flatten(1) if flat else x), y


@pytest.fixture(scope="module")
def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)), True)


@pytest.fixture(scope="module")
def convolutional() -> nn.Module:
    torch.manual_seed(1)
    return trained(
        nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        ),
        False,
    )


def copy(model: nn.Module) -> nn.Module:
    import copy as copies

    return copies.deepcopy(model)


SETTINGS = Settings(Choice(256), restarts=2)


@pytest.mark.parametrize("start", ["magnitude", "wanda"])
def test_sixty_steps_take_a_quarter_of_the_loss_away(perceptron: nn.Module, start: Any) -> None:
    search = ModuleSearch(
        copy(perceptron), losses, sparsity=0.9, start=start, batch=batch(0, 200, True), settings=SETTINGS
    )
    held = batch(5000, 1000, True)
    before, kept = search.loss(held), {name: int(state.keep.sum()) for name, state in search.states.items()}
    for index, name in enumerate(search.schedule(60)):
        taken = search.step(batch(2000 + index, 200, True), name)
        assert taken is None or taken.energy <= 0
    assert search.loss(held) <= 0.75 * before
    for name, state in search.states.items():
        assert int(state.keep.sum()) == kept[name]
        weight = search.modules[name].get_parameter("weight")
        assert torch.equal(weight[state.keep], search.originals[name][state.keep])
        assert not weight[~state.keep].any()


def test_annealing_does_it_too(perceptron: nn.Module) -> None:
    settings = Settings(Choice(64), solver="anneal", restarts=2, sweeps=8)
    search = ModuleSearch(copy(perceptron), losses, sparsity=0.8, settings=settings)
    held = batch(5000, 1000, True)
    before = search.loss(held)
    for index, name in enumerate(search.schedule(12)):
        search.step(batch(2000 + index, 200, True), name)
    assert search.loss(held) < before


def test_couplings_matter(perceptron: nn.Module) -> None:
    """Without what samples already expect, every layer of a sweep claims the same gain and the loss gets worse."""
    held, final = batch(5000, 1000, True), {}
    for joint in (True, False):
        search = ModuleSearch(copy(perceptron), losses, sparsity=0.8, settings=SETTINGS)
        for index in range(10):
            if joint:
                search.sweep(batch(2000 + index, 200, True))
                continue
            _, gradients = search._gradients(batch(2000 + index, 200, True), list(search.modules))
            steps = {name: search._decide(name, gradients[name], None) for name in search.modules}
            for name, step in steps.items():
                if step is not None:
                    search.states[name] = type(search.states[name])(
                        step.keep(), step.state.free, step.state.rested_pruned, step.state.rested_kept
                    )
                    search._apply(name)
            search.steps += 1
        final[joint] = search.loss(held)
    assert final[True] < final[False]


def test_every_layer_of_a_sweep_has_its_share(perceptron: nn.Module) -> None:
    search = ModuleSearch(copy(perceptron), losses, sparsity=0.9, settings=SETTINGS)
    taken = search.sweep(batch(2000, 200, True))
    assert [step.name for step in taken] == ["4", "2", "0"]
    gains = [-step.predicted for step in taken]
    assert min(gains) > 0.05 * sum(gains), "the layers decided first took it all"


@pytest.mark.parametrize("pattern", [None, "1:4"])
def test_convolutions_are_searched(convolutional: nn.Module, pattern: str | None) -> None:
    settings = Settings(Choice(256), groups=4 if pattern else None)
    layers = ["2", "5"]
    search = ModuleSearch(copy(convolutional), losses, layers=layers, sparsity=0.9, pattern=pattern, settings=settings)
    held = batch(5000, 500, False)
    before = search.loss(held)
    for index in range(8):
        search.sweep(batch(2000 + index, 200, False))
    assert search.loss(held) < before
    if pattern:
        assert all(Pattern.parse(pattern).fits(state.keep) for state in search.states.values())


@pytest.mark.parametrize("flat", [True, False])
def test_gradients_of_single_samples(perceptron: nn.Module, convolutional: nn.Module, flat: bool) -> None:
    model = copy(perceptron if flat else convolutional)
    search = ModuleSearch(model, losses, sparsity=0.5, settings=SETTINGS)
    x, y = batch(0, 5, flat)
    _, found = search._gradients((x, y), list(search.modules))
    for name, module in search.modules.items():
        weight = module.get_parameter("weight").requires_grad_()
        for sample in range(5):
            loss = losses(model, (x[sample : sample + 1], y[sample : sample + 1])).sum()
            (expected,) = torch.autograd.grad(loss, weight)
            every = found[name].columns(torch.arange(weight.numel()))
            assert torch.allclose(every[sample], expected.flatten(), atol=1e-5)
        assert torch.allclose(every.mean(0).view(search.originals[name].shape), found[name].mean(), atol=1e-6)
        weight.requires_grad_(False)


def test_steps_are_shared_out_by_size() -> None:
    rng = torch.Generator().manual_seed(0)
    assert allocate([401408, 262144, 5120], 300, 1, rng) == [114, 110, 76]
    assert allocate([401408, 262144, 5120], 3, 1, rng) == [1, 1, 1]
    many = allocate([16_777_216] * 224, 300, 10, rng)
    assert sum(many) == 300
    assert sorted(set(many)) == [1, 2]


def test_what_cannot_be_searched_is_refused(perceptron: nn.Module) -> None:
    model = copy(perceptron)
    with pytest.raises(RecipeError, match="training"):
        ModuleSearch(copy(perceptron).train(), losses, settings=SETTINGS)
    with pytest.raises(RecipeError, match="needs a batch"):
        ModuleSearch(model, losses, start="wanda", settings=SETTINGS)
    with pytest.raises(UnsupportedError, match="no linear layer"):
        ModuleSearch(model, losses, layers=["1"], settings=SETTINGS)
