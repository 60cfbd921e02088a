"""Labelled images from files, samples of them, and the labels a model uses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import CheckpointError, HubError, RecipeError
from compressor.testing.images import rare_digits
from compressor.vision.images import ImageSet, hub_rows, read_data
from compressor.vision.pixels import Pixels, Preprocess, align_labels
from compressor.vision.scores import from_confusion


def images_of(labels: list[int], classes: tuple[str, ...] = ("a", "b", "c")) -> ImageSet:
    return ImageSet(lambda i: np.full((4, 4, 1), i, dtype=np.uint8), torch.tensor(labels), classes)


def test_digits_become_rare(tmp_path: Path) -> None:
    data = read_data(str(rare_digits(tmp_path / "digits.npz")))
    counts = data.train.counts.tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 15 * counts[-1] > 0
    assert data.test.counts.tolist() == [40] * 10
    assert data.train.read(3).shape == (8, 8, 1)


def test_npz_without_a_test_set_holds_some_of_every_class_back(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    labels = np.repeat([0, 1, 2], [50, 10, 5])
    np.savez(path, x=np.zeros((65, 5, 5, 3), dtype=np.uint8), y=labels)
    data = read_data(str(path), seed=3)
    assert data.test.counts.tolist() == [10, 2, 1]
    assert data.train.counts.tolist() == [40, 8, 4]
    assert "held back" in data.events[0]


def test_medmnist_names_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    images, labels = np.zeros((4, 6, 6), dtype=np.uint8), np.array([[0], [1], [1], [0]])
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    data = read_data(str(path))
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.test.read(0).shape == (6, 6, 1)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"x_train": np.zeros((2, 4, 4, 3)), "y_train": np.array([0, 1])}, CheckpointError, "float64"),
        (
            {"x_train": np.zeros((2, 4, 4, 3), np.uint8), "y_train": np.array([0])},
            CheckpointError,
            r"labels int64 \[1\]",
        ),
        ({"x_train": np.zeros((1, 4, 4, 3), np.uint8), "y_train": np.array([-1])}, CheckpointError, "from 0"),
        (
            {"x_train": np.zeros((1, 4, 4, 3), np.uint8), "y_train": np.array([2]), "classes": np.array(["a"])},
            CheckpointError,
            "only 1 names",
        ),
        ({"pictures": np.zeros(3)}, RecipeError, "no x_train"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, arrays: dict[str, Any], error: type[Exception], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(error, match=message):
        read_data(str(tmp_path / "x.npz"))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x_train=np.array([{"a": 1}], dtype=object), y_train=np.array([0]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_data(str(tmp_path / "x.npz"))


def test_folders_of_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name, shade in (("cat", 10), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                image.new("RGB", (7, 5), (shade, shade, number)).save(tmp_path / split / name / f"{number}.png")
    data = read_data(str(tmp_path))
    assert data.train.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.read(5).shape == (5, 7, 3)
    assert data.test.read(5)[0, 0].tolist() == [200, 200, 2]
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"0\.png"):
        data.train.read(0)


def test_folders_without_images_and_absent_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no folders with images"):
        read_data(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such"):
        read_data(str(tmp_path / "nothing"))


def test_hub_datasets_offline_and_by_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        read_data("owner/name")
    image = pytest.importorskip("PIL.Image")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"img": [image.new("L", (3, 2), 9)] * 2, "label": [1, 0]}, features=features)
    found = hub_rows(rows, "here")
    assert found.classes == ("no", "yes")
    assert found.labels.tolist() == [1, 0]
    assert found.read(0).tolist() == [[[9]] * 3] * 2
    with pytest.raises(RecipeError, match="0 image columns"):
        hub_rows(rows.remove_columns("img"), "here")


def test_balanced_samples_have_equally_many_of_every_class() -> None:
    images = images_of([0] * 80 + [1] * 10 + [2] * 3)
    chosen = images.draw(24, True, seed=1)
    assert images.subset(chosen).counts.tolist() == [11, 10, 3]
    assert len(set(chosen.tolist())) == 24
    assert images.draw(24, False, seed=1).tolist() == images.draw(24, False, seed=1).tolist()
    assert images.subset(images.draw(30, False, seed=1)).counts[0] > 20


def config(names: dict[int, str]) -> SimpleNamespace:
    return SimpleNamespace(num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()})


def test_labels_follow_the_models_names() -> None:
    named = align_labels(images_of([0, 1, 2]), config({0: "C", 1: "A", 2: "B", 3: "other"}))
    assert named.labels.tolist() == [1, 2, 0]
    assert named.classes == ("C", "A", "B", "other")
    plain = align_labels(images_of([0, 1, 2]), config({i: f"LABEL_{i}" for i in range(4)}))
    assert plain.labels.tolist() == [0, 1, 2]
    assert plain.classes == ("a", "b", "c", "3")
    with pytest.raises(RecipeError, match="no class 'b'"):
        align_labels(images_of([0, 1, 2]), config({0: "a", 1: "c", 2: "x"}))
    with pytest.raises(RecipeError, match="3 classes, the model 2"):
        align_labels(images_of([0, 1, 2]), config({0: "LABEL_0", 1: "LABEL_1"}))


def test_pixels_without_a_processor(tmp_path: Path) -> None:
    images = images_of([0, 1, 2])
    pixels = Pixels(images, Preprocess(tmp_path, 3))
    assert pixels[torch.tensor([2])].shape == (1, 3, 4, 4)
    assert float(pixels[torch.tensor([2])].max()) == pytest.approx(2 / 255)
    assert pixels.subset(torch.tensor([1, 2])).labels.tolist() == [1, 2]


def test_pixels_with_the_checkpoints_processor(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    processor = ConvNextImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(tmp_path)
    found = Preprocess(tmp_path, 3)([np.full((4, 6, 3), 255, dtype=np.uint8)])
    assert found.shape == (1, 3, 4, 6)
    torch.testing.assert_close(found, torch.full_like(found, 2.0))


def test_scores_of_a_confusion_matrix() -> None:
    scores = from_confusion(torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]]), ("a", "b", "c"), 0.5)
    assert scores.accuracy == pytest.approx(9 / 12)
    assert scores.balanced_accuracy == pytest.approx((0.8 + 0.5) / 2)
    assert scores.recall == pytest.approx({"a": 0.8, "b": 0.5})
    assert scores.macro_f1 == pytest.approx((16 / 19 + 2 / 5) / 2)
