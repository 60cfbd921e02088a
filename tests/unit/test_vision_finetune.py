"""Training: it learns, weighs classes, stops, and continues where it was stopped with the same result."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import NumericalError
from compressor.testing.images import rare_digits
from compressor.vision import finetune
from compressor.vision.finetune import Training, class_weights, shifted, train
from compressor.vision.images import read_data
from compressor.vision.pixels import Pixels, Preprocess
from compressor.vision.scores import evaluate

CPU = torch.device("cpu")


def digits(folder: Path) -> tuple[Pixels, Pixels]:
    data = read_data(str(rare_digits(folder / "digits.npz")))
    preprocess = Preprocess(folder, 1)
    return Pixels(data.train, preprocess), Pixels(data.test, preprocess)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 10),
    )  # fmt: skip


def test_it_learns_and_balanced_loss_helps_the_rare(tmp_path: Path) -> None:
    images, test = digits(tmp_path)
    found = {}
    for loss in ("plain", "balanced"):
        model = small()
        train(model, images, Training(epochs=6, lr=0.02, batch=32, loss=loss, augment="none"), CPU)
        found[loss] = evaluate(model, test, CPU)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert found["plain"].accuracy > 0.6
    rare = [str(digit) for digit in range(6, 10)]
    assert sum(found["balanced"].recall[d] for d in rare) > sum(found["plain"].recall[d] for d in rare)


def test_weights_of_classes(tmp_path: Path) -> None:
    images, _ = digits(tmp_path)
    weights, counts = class_weights(images, CPU), images.images.counts
    torch.testing.assert_close(weights * counts, torch.full((10,), len(images) / 10))


def test_stopped_training_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, test = digits(tmp_path)
    settings = Training(epochs=3, batch=32)
    whole, stopped = small(), small()
    history = train(whole, images, settings, CPU, validation=test).history
    folder = tmp_path / "state"
    folder.mkdir()

    def stop(text: str) -> None:
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, images, settings, CPU, validation=test, folder=folder, told=stop)
    again = small(seed=9)  # nothing of it may survive
    lines: list[str] = []
    progress = train(again, images, settings, CPU, validation=test, folder=folder, told=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["epoch 3/3"]
    assert progress.history == history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".pkl", ".bin")]


def test_best_epoch_is_kept_and_idle_training_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, test = digits(tmp_path)
    seen = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    states = []

    class Fixed:
        def __init__(self, value: float) -> None:
            self.balanced_accuracy = value

    def fixed(model: nn.Module, *_: object) -> Fixed:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return Fixed(next(seen))

    monkeypatch.setattr(finetune, "evaluate", fixed)
    model = small()
    progress = train(model, images, Training(epochs=9, patience=2), CPU, validation=test)
    assert (progress.epoch, progress.best_epoch, progress.best) == (4, 2, 0.5)
    for name, tensor in states[1].items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_diverging_training_is_an_error(tmp_path: Path) -> None:
    images, _ = digits(tmp_path)
    with pytest.raises(NumericalError, match="loss is"):
        train(small(), images, Training(epochs=3, lr=1e12), CPU)


def test_shifts_move_and_flips_mirror() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    moved = shifted(image, "shift", generator)
    offsets = {(int(m[0, 3, 3]) // 8 - 3, int(m[0, 3, 3]) % 8 - 3) for m in moved}
    assert offsets == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    flipped = shifted(image, "flip", generator)
    assert {tuple(m[0, 0].tolist()) for m in flipped} == {tuple(range(8)), tuple(range(7, -1, -1))}
    assert torch.equal(shifted(image, "none", generator), image)
