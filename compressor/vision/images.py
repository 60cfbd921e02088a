"""Labelled images: from a folder, an `.npz` file, or a dataset of the Hub.

Images stay where they are until they are asked for, as unsigned bytes `[height, width, channels]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CheckpointError, CompressorError, HubError, RecipeError, UnsupportedError
from compressor.offline import forbidden_by

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
HELD_BACK = 0.2
"""Share of every class that is tested on where the data has no test set."""


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Attributes:
        read: Index -> uint8 `[height, width, channels]`, one or three channels.
        labels: int64 `[images]`.
        classes: Names, by label.
    """

    read: Callable[[int], np.ndarray]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> Tensor:
        """Images per class, int64 `[classes]`."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def subset(self, indices: Tensor) -> ImageSet:
        """Return some of the images, in this order."""
        chosen, read = indices.tolist(), self.read
        return replace(self, read=lambda index: read(chosen[index]), labels=self.labels[indices])

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Return what stays and a random share of every class; a class with two images or more is in both."""
        generator = torch.Generator().manual_seed(seed)
        taken = []
        for label in range(len(self.classes)):
            members = (self.labels == label).nonzero().flatten()
            count = min(max(round(share * len(members)), 1), len(members) - 1) if len(members) > 1 else 0
            taken.append(members[torch.randperm(len(members), generator=generator)[:count]])
        second = torch.cat(taken).sort().values
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[second] = False
        return self.subset(stays.nonzero().flatten()), self.subset(second)

    def draw(self, count: int, balanced: bool, seed: int) -> Tensor:
        """Return indices of a random sample without repetition, int64.

        Args:
            count: How many, or all if there are fewer.
            balanced: Equally many of every class; of classes that have too few all are taken, and others give more.
            seed: Of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        if not balanced:
            return order[:count].sort().values
        # Sorted by each image's place among its own class: the first of every class, then the second, and so on.
        labels = self.labels[order]
        place = torch.zeros(len(self), dtype=torch.long)
        for label in range(len(self.classes)):
            mine = labels == label
            place[mine] = torch.arange(int(mine.sum()))
        return order[torch.sort(place, stable=True).indices[:count]].sort().values


@dataclass(frozen=True)
class ImageData:
    """What a `--data` argument holds.

    Attributes:
        name: The argument.
        train: For ranking and training.
        test: What is measured on.
        events: What the user should know about it.
    """

    name: str
    train: ImageSet
    test: ImageSet
    events: tuple[str, ...] = ()


def read_data(data: str, seed: int = 0) -> ImageData:
    """Read labelled images.

    Args:
        data: A folder (`CLASS/image.png`, or that below `train` and `test`), an `.npz` file (`x_train`, `y_train`,
            `x_test`, `y_test` and perhaps `classes`; or MedMNIST's names), or a Hub dataset (`owner/name[:config]`).
        seed: Of the images held back where there is no test set.

    Raises:
        CheckpointError: It is not there, or is damaged.
        RecipeError: It holds something else.
        HubError: It must be fetched and cannot be.
    """
    path = Path(data)
    if path.is_dir():
        sets = _folder(path)
    elif path.suffix == ".npz":
        sets = _npz(path)
    elif path.exists():
        raise RecipeError(f"{data}: images are read from folders and .npz files", "see docs/vision.md")
    elif data.count("/") == 1 and not data.startswith((".", "/")):
        sets = _hub(data)
    else:
        raise CheckpointError(f"{data}: no such folder or file", "check the path")
    train = _first(sets, TRAIN)
    test = _first(sets, TEST)
    events: tuple[str, ...] = ()
    if train is None:
        raise RecipeError(f"{data}: no training images, only {', '.join(sets)}", "name them train, see docs/vision.md")
    if len(train) == 0:
        raise RecipeError(f"{data}: holds no training images", "see docs/vision.md")
    if test is None:
        train, test = train.split(HELD_BACK, seed)
        events = (f"{data}: no test set; {len(test)} images, {HELD_BACK:.0%} of every class, are held back as one",)
    if train.classes != test.classes:
        raise RecipeError(
            f"{data}: classes differ: {', '.join(train.classes)} and {', '.join(test.classes)}", "give both all classes"
        )
    return ImageData(data, train, test, events)


def as_bytes(image: Any) -> np.ndarray:
    """Return an image as uint8 `[height, width, channels]` with one or three channels.

    Raises:
        CheckpointError: It is none.
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or array.dtype != np.uint8:
        raise CheckpointError(
            f"an image is {array.dtype} {list(array.shape)}", "images are uint8 [height, width, 1 or 3 channels]"
        )
    return array


def _first(sets: Mapping[str, ImageSet], names: Sequence[str]) -> ImageSet | None:
    return next((sets[name] for name in names if name in sets), None)


def _npz(path: Path) -> dict[str, ImageSet]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}", "is it an .npz file?") from error
    sets = {}
    names = arrays.get("classes")
    for split, keys in {
        "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("images", "labels")),
        "test": (("x_test", "y_test"), ("test_images", "test_labels")),
    }.items():
        found = next((pair for pair in keys if pair[0] in arrays and pair[1] in arrays), None)
        if found is not None:
            sets[split] = _arrays(path, arrays[found[0]], arrays[found[1]], names)
    if not sets:
        raise RecipeError(f"{path}: no x_train and y_train, only {', '.join(sorted(arrays))}", "see docs/vision.md")
    classes = max((one.classes for one in sets.values()), key=len)
    return {name: replace(one, classes=classes) for name, one in sets.items()}


def _arrays(path: Path, images: np.ndarray, labels: np.ndarray, names: np.ndarray | None) -> ImageSet:
    labels = labels.reshape(-1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise CheckpointError(
            f"{path}: images {images.dtype} {list(images.shape)}, labels {labels.dtype} {list(labels.shape)}",
            "images are uint8 [images, height, width(, channels)], with one whole number per image",
        )
    if labels.dtype.kind not in "iu" or (len(labels) and int(labels.min()) < 0):
        raise CheckpointError(f"{path}: labels ({labels.dtype}) are not whole numbers from 0", "number the classes")
    count = int(labels.max()) + 1 if len(labels) else 0
    if names is not None and len(names) < count:
        raise CheckpointError(f"{path}: label {count - 1}, but only {len(names)} names in classes", "name all of them")
    classes = tuple(str(name) for name in names) if names is not None else tuple(str(n) for n in range(count))
    return ImageSet(lambda index: as_bytes(images[index]), torch.from_numpy(labels.astype(np.int64)), classes)


def _folder(path: Path) -> dict[str, ImageSet]:
    below = {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir()}
    known = {name: folder for name, folder in below.items() if name.lower() in (*TRAIN, *TEST)}
    sets = {name.lower(): _classes(folder) for name, folder in known.items()} or {"train": _classes(path)}
    return sets


def _classes(path: Path) -> ImageSet:
    files: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        mine = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        files += mine
        labels += [len(names)] * len(mine)
        names.append(folder.name)
    if not files:
        raise RecipeError(
            f"{path}: no folders with images ({', '.join(SUFFIXES)}) in it", "one folder per class, named like it"
        )
    return ImageSet(lambda index: _open(files[index]), torch.tensor(labels), tuple(names))


def _open(file: Path) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise _needs_pillow(str(file)) from error
    try:
        with Image.open(file) as image:
            return as_bytes(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise CheckpointError(f"{file}: no readable image: {str(error).splitlines()[0]}", "remove it") from error


def _hub(data: str) -> dict[str, ImageSet]:
    """Read a dataset of the Hub that has one image column and one column of class labels."""
    if variable := forbidden_by():
        raise HubError(f"data {data!r} is a Hub dataset and {variable} forbids fetching it", f"unset {variable}")
    import datasets  # type: ignore[import-untyped]  # takes seconds, and only this function needs it

    name, _, config = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except CompressorError:
        raise
    except Exception as error:  # its clients have errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"dataset {data!r}: {reason}", "check the name, the network and your login") from error
    return {split: hub_rows(rows, f"{data} {split}") for split, rows in loaded.items()}


def hub_rows(rows: Any, where: str) -> ImageSet:
    """Turn a split of a `datasets` dataset into images with labels.

    Raises:
        RecipeError: It has not exactly one column of images and one of class labels.
        UnsupportedError: Pillow is not there to decode them.
    """
    import datasets

    kinds = {name: type(feature) for name, feature in rows.features.items()}
    images = [name for name, kind in kinds.items() if kind is datasets.Image]
    labels = [name for name, kind in kinds.items() if kind is datasets.ClassLabel]
    if len(images) != 1 or len(labels) != 1:
        raise RecipeError(
            f"{where}: {len(images)} image columns and {len(labels)} label columns among {', '.join(sorted(kinds))}",
            "it needs one Image and one ClassLabel column; save other data as folders or .npz",
        )
    try:
        import PIL.Image  # noqa: F401 - decodes the images
    except ImportError as error:
        raise _needs_pillow(where) from error

    def read(index: int) -> np.ndarray:
        image = rows[index][images[0]]
        return as_bytes(image if image.mode in ("L", "RGB") else image.convert("RGB"))

    values = torch.tensor(rows[labels[0]], dtype=torch.long)
    if len(values) and int(values.min()) < 0:
        raise RecipeError(f"{where}: {int((values < 0).sum())} images have no label", "give splits that have labels")
    return ImageSet(read, values, tuple(rows.features[labels[0]].names))


def _needs_pillow(where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: reading image files needs the package pillow", "pip install 'compress-hf[vision]'"
    )
