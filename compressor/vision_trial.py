"""One seed of a comparison of classifiers that are cut, trained and then rounded by the package's own methods.

`python -m compressor.vision_trial SPEC.json RESULT.json`: `compressor.vision.experiment` with roundings.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from compressor.api import execute, prepare
from compressor.recipe import CalibrationSpec, Recipe
from compressor.runtime import load
from compressor.vision.experiment import Rounding, main


def rounded(checkpoint: Path, rounding: Rounding, data: str, seed: int) -> tuple[nn.Module, int]:
    """Round a checkpoint's blocks as `compress quantize` does, and load what it wrote.

    Args:
        checkpoint: An image classifier.
        rounding: How.
        data: Labelled images to calibrate on.
        seed: Of everything random.

    Returns:
        The model, and the bytes of its tensors on disk.

    Raises:
        CompressorError: See `compressor.api`.
    """
    recipe = Recipe(
        model=str(checkpoint),
        method=rounding.method,
        format=rounding.format,
        group_size="channel",
        options=rounding.options,
        batch_norm=rounding.batch_norm,
        calibration=CalibrationSpec(data=data, n_samples=rounding.n_samples),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(recipe, Path(folder) / "rounded", device="cpu")
        # In this process: the checkpoint is read back here anyway, and starting Python takes longer than rounding.
        report = execute(job, fresh=False)
        return load(job.out), report.bytes_after


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:], rounded))
