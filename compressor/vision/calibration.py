"""Images that calibrate a classifier: some of the training images, as the model takes them, a few to a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.calibration.dataset import CalibrationSet, fingerprint
from compressor.calibration.presets import PRESETS
from compressor.errors import RecipeError
from compressor.recipe import CalibrationSpec
from compressor.vision.images import read_data
from compressor.vision.pixels import Preprocess

IMAGES = 8
"""Images of one sample: what a window of text is for a language model."""


def calibration_images(spec: CalibrationSpec, path: Path, config: Any, seed: int = 0) -> CalibrationSet:
    """Draw calibration images, equally many of every class as far as there are so many.

    Args:
        spec: `data` as `compress prune --data` takes it, and the number of samples, of `IMAGES` images each.
        path: The checkpoint, for its image processor.
        config: The model's.
        seed: Of the choice.

    Returns:
        A set whose `tokens` are pixels, float32 `[n_samples, IMAGES, channels, height, width]`.

    Raises:
        RecipeError: The data is text, or holds too few images.
        CheckpointError: The data cannot be read.
    """
    if spec.data in PRESETS:
        raise RecipeError(
            f"data {spec.data!r} is text, and this model reads images", "pass images: --data FOLDER, or an .npz file"
        )
    data = read_data(spec.data, seed)
    images, wanted = data.train, spec.n_samples * IMAGES
    if len(images) < wanted:
        raise RecipeError(
            f"{spec.data}: {spec.n_samples} samples are {wanted} images, the training set has {len(images)}",
            f"use --n-samples {len(images) // IMAGES}" if len(images) >= IMAGES else "pass more images",
        )
    preprocess = Preprocess(path, getattr(config, "num_channels", 3))
    chosen = images.draw(wanted, balanced=True, seed=seed).tolist()
    pixels = preprocess([images.read(index) for index in chosen]).unflatten(0, (spec.n_samples, IMAGES))
    source: dict[str, str | int] = {
        "data": spec.data,
        "origin": spec.data,
        "split": "train",
        "seed": seed,
        "n_samples": spec.n_samples,
        "images": wanted,
    }
    return CalibrationSet(pixels, source, fingerprint(pixels), (*data.events, *preprocess.events))
