"""How well a classifier does, class by class: what counts where most images are of one class."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import NumericalError
from compressor.vision.clusters import logits_of
from compressor.vision.pixels import Pixels


@dataclass(frozen=True)
class Scores:
    """Figures over a whole data set; all are shares, 0 to 1.

    Attributes:
        accuracy: Correct images.
        balanced_accuracy: Mean of the recalls: what chance gets is 1 / classes, however unequal classes are.
        macro_f1: Mean over classes of the harmonic mean of precision and recall.
        recall: Of each class that has images, correct ones, by name.
        loss: Mean cross-entropy.
        images: How many were looked at.
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    recall: dict[str, float]
    loss: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def from_confusion(confusion: Tensor, classes: tuple[str, ...], loss: float) -> Scores:
    """Return the figures of a confusion matrix, int64 `[true, predicted]`; classes without images do not count."""
    counts = confusion.double()
    present = counts.sum(1) > 0
    hits, truth, predicted = counts.diagonal()[present], counts.sum(1)[present], counts.sum(0)[present]
    recall = hits / truth
    f1 = 2 * hits / (truth + predicted)
    names = [name for name, there in zip(classes, present.tolist(), strict=True) if there]
    return Scores(
        accuracy=float(counts.diagonal().sum() / counts.sum()),
        balanced_accuracy=float(recall.mean()),
        macro_f1=float(f1.mean()),
        recall=dict(zip(names, recall.tolist(), strict=True)),
        loss=loss,
        images=int(counts.sum()),
    )


@torch.no_grad()
def evaluate(model: nn.Module, pixels: Pixels, device: torch.device, batch: int = 256) -> Scores:
    """Classify all images with a model in eval mode.

    Raises:
        NumericalError: Its output is not finite.
    """
    size = len(pixels.images.classes)
    confusion = torch.zeros(size * size, dtype=torch.long)
    loss = 0.0
    for images, labels in pixels.batches(batch):
        logits = logits_of(model(images.to(device))).float().cpu()
        if not torch.isfinite(logits).all():
            raise NumericalError(f"{type(model).__name__}: logits are not finite", "is the checkpoint sound?")
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        confusion += torch.bincount(labels * size + logits[:, :size].argmax(1), minlength=size * size)
    return from_confusion(confusion.reshape(size, size), pixels.images.classes, loss / len(pixels))
