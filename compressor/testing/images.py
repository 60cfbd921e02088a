"""Small image classifiers, and digits of which some are rare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from compressor.testing.models import random_model

_TEN: dict[str, Any] = {"num_labels": 10}
_STAGES: dict[str, Any] = {**_TEN, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}


def tiny_classifier(kind: str, seed: int = 0) -> PreTrainedModel:
    """Build a random classifier of ten classes for 3 x 32 x 32 images, with used-looking statistics.

    Args:
        kind: `resnet`, `bottleneck` (a ResNet of bottlenecks), `regnet` (grouped convolutions, squeeze and excite),
            `mobilenet` (depthwise convolutions) or `convnext` (linear layers over positions).
        seed: Of the weights.
    """
    builders: dict[str, Any] = {
        "resnet": lambda: ResNetForImageClassification(ResNetConfig(**_STAGES, layer_type="basic")),
        "bottleneck": lambda: ResNetForImageClassification(ResNetConfig(**_STAGES, layer_type="bottleneck")),
        "regnet": lambda: RegNetForImageClassification(RegNetConfig(**_STAGES, groups_width=8, layer_type="y")),
        "mobilenet": lambda: MobileNetV2ForImageClassification(
            MobileNetV2Config(**_TEN, depth_multiplier=0.35, image_size=32)
        ),
        "convnext": lambda: ConvNextForImageClassification(
            ConvNextConfig(**_TEN, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5)
        ),
    }
    model = random_model(builders[kind], seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model


def rare_digits(path: Path, decay: float = 0.72, seed: int = 0) -> Path:
    """Write scikit-learn's digits as an `.npz` file: 8 x 8 gray images, each class rarer than the one before it.

    Args:
        path: Where to.
        decay: Training images of a class over those of the class before it.
        seed: Of what goes into training and test.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], digits.target[order].astype(np.int64)
    train, test = [], []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test += members[:40].tolist()
        train += members[40 : 40 + max(round(130 * decay**label), 4)].tolist()
    np.savez(path, x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test])
    return path
