"""From stored images to what a model takes, with the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.checkpoint.config import quiet
from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.vision.images import ImageSet

PROCESSOR = "preprocessor_config.json"
CACHE_BYTES = 1 << 30
"""Processed images are kept in memory up to this size, and made anew each time above it."""


class Preprocess:
    """Turns unsigned bytes into model inputs.

    Attributes:
        events: What the user should know about it.
    """

    def __init__(self, path: Path, channels: int) -> None:
        """Read the checkpoint's image processor; one that has none gets bytes scaled to 0..1.

        Args:
            path: The checkpoint.
            channels: What the model takes.

        Raises:
            CheckpointError: transformers rejects the processor's config.
            UnsupportedError: Pillow, which processors need, is not there.
        """
        self.channels = channels
        self.events: tuple[str, ...] = ()
        self._processor: Any = None
        if not (path / PROCESSOR).is_file():
            self.events = (f"{path}: no {PROCESSOR}; images are scaled to 0..1 and nothing else",)
            return
        try:
            import PIL  # noqa: F401 - the processor resizes with it
        except ImportError as error:
            raise UnsupportedError(
                f"{path}: its image processor needs the package pillow", "pip install 'compress-hf[vision]'"
            ) from error
        from transformers import AutoImageProcessor

        try:
            with quiet():
                self._processor = AutoImageProcessor.from_pretrained(path)
        except Exception as error:  # transformers raises whatever the file provokes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path / PROCESSOR}: {reason}", "is it an image processor's config?") from error

    def __call__(self, images: list[np.ndarray]) -> Tensor:
        """Return `[images, channels, height, width]` float32.

        Raises:
            RecipeError: Images of different sizes, which only a processor could make alike.
        """
        images = [self._with_channels(image) for image in images]
        if self._processor is not None:
            with quiet():
                pixels: Tensor = self._processor(images, return_tensors="pt", input_data_format="channels_last")[
                    "pixel_values"
                ]
            return pixels.float().contiguous()
        if len({image.shape for image in images}) > 1:
            raise RecipeError(
                f"images of different sizes, such as {images[0].shape[:2]}, and the checkpoint has no {PROCESSOR}",
                "add one, or resize the images",
            )
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255

    def _with_channels(self, image: np.ndarray) -> np.ndarray:
        if image.shape[-1] == self.channels:
            return image
        if image.shape[-1] == 1:
            return np.repeat(image, self.channels, axis=-1)
        raise RecipeError(f"images have {image.shape[-1]} channels, the model takes {self.channels}")


class Pixels:
    """Images as model inputs, with labels.

    Attributes:
        images: What they are made from.
        labels: int64 `[images]`.
    """

    def __init__(self, images: ImageSet, preprocess: Preprocess) -> None:
        self.images = images
        self.labels = images.labels
        self._preprocess = preprocess
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the images with these indices, `[n, channels, height, width]` float32."""
        if self._cache is None:
            self._fill()
        if self._cache is not None:
            return self._cache[indices]
        return self._make(indices)

    def subset(self, indices: Tensor) -> Pixels:
        """Return some of the images; what is in memory is shared."""
        part = Pixels(self.images.subset(indices), self._preprocess)
        if self._cache is not None:
            part._cache = self._cache[indices]
        return part

    def batches(self, size: int, indices: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels in order, `size` at a time."""
        chosen = torch.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield self[part], self.labels[part]

    def _make(self, indices: Tensor) -> Tensor:
        return self._preprocess([self.images.read(index) for index in indices.tolist()])

    def _fill(self) -> None:
        one = self._make(torch.zeros(1, dtype=torch.long))
        if one.numel() * one.element_size() * len(self) > CACHE_BYTES:
            return
        parts = torch.arange(len(self)).split(256)
        self._cache = torch.cat([self._make(part) for part in parts])


def align_labels(images: ImageSet, config: Any) -> ImageSet:
    """Give images the labels a model uses for their classes.

    Names decide where the model has names of its own; labels stay as they are where either side has only numbers.

    Args:
        images: With class names.
        config: The model's: `num_labels`, `label2id`.

    Raises:
        RecipeError: The model does not know these classes.
    """
    ids = {str(name).lower(): int(index) for name, index in (config.label2id or {}).items()}
    unnamed = all(name == f"label_{index}" for name, index in ids.items()) or all(name.isdigit() for name in ids)
    names = [name.lower() for name in images.classes]
    if not unnamed and not all(name.isdigit() for name in names):
        if missing := [name for name in names if name not in ids]:
            raise RecipeError(
                f"the model has no class {missing[0]!r}; it has {', '.join(list(ids)[:8])}", "rename the data's classes"
            )
        mapping = torch.tensor([ids[name] for name in names])
        in_order = sorted(config.id2label.items(), key=lambda item: int(item[0]))
        return replace(images, labels=mapping[images.labels], classes=tuple(str(name) for _, name in in_order))
    if len(images.classes) > config.num_labels:
        raise RecipeError(
            f"the data has {len(images.classes)} classes, the model {config.num_labels}", "fine-tune it for them first"
        )
    extra = tuple(str(number) for number in range(len(images.classes), config.num_labels))
    return replace(images, classes=(*images.classes, *extra))
