"""Training a classifier after a cut, or from the start: SGD with a cosine schedule, through accelerate.

Every epoch that ends is saved: a run that was stopped continues behind it and takes the same steps. The order of images
and how they are shifted and flipped depend on the seed and the epoch alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.checkpoint.sink import save_tensors
from compressor.errors import NumericalError, disk_error
from compressor.vision.clusters import logits_of
from compressor.vision.pixels import Pixels
from compressor.vision.scores import evaluate

Augment: TypeAlias = Literal["none", "shift", "flip", "shift+flip"]
Loss: TypeAlias = Literal["plain", "balanced"]

STATE, TENSORS = "finetune.json", "finetune.safetensors"


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        epochs: Times through the images.
        lr: Learning rate of the first step; it falls to 0 along a cosine.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch: Images per step.
        loss: `plain` cross-entropy, or `balanced`: every class weighs the same in sum.
        augment: Random shifts by up to an eighth of the image, random horizontal flips, both, or neither.
        patience: Epochs without a better validation before stopping; 0 never stops.
        seed: Of order and augmentation.
    """

    epochs: int
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 64
    loss: Loss = "plain"
    augment: Augment = "shift+flip"
    patience: int = 0
    seed: int = 0


@dataclass
class Progress:
    """How far training is.

    Attributes:
        epoch: Finished epochs.
        history: Per epoch: mean training loss, and validation's balanced accuracy where there is a validation set.
        best: Best balanced accuracy so far; None without validation.
        best_epoch: The epoch it was reached in, from 1.
    """

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = 0


def train(
    model: nn.Module,
    images: Pixels,
    settings: Training,
    device: torch.device,
    *,
    validation: Pixels | None = None,
    folder: Path | None = None,
    told: Callable[[str], None] = lambda text: None,
    after_step: Callable[[float], None] = lambda rate: None,
) -> Progress:
    """Train a model in place and leave it in eval mode without gradients.

    With a validation set the parameters of its best epoch (by balanced accuracy, the earliest of equals) are kept.

    Args:
        model: Any classifier; it is moved nowhere, `device` is where it is.
        images: To train on.
        settings: How.
        device: Where.
        validation: For early stopping.
        folder: Where the state is saved after every epoch, and continued from; None saves nothing.
        told: Hears one line per epoch.
        after_step: Called with the learning rate of every step behind it; may change parameters.

    Raises:
        NumericalError: The loss is not finite.
        ResourceError: The state cannot be saved.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    _touch(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    weights = class_weights(images, device) if settings.loss == "balanced" else None
    best: dict[str, Tensor] = {}
    progress = _restore(folder, model, optimizer, best) or Progress()
    steps = -(-len(images) // settings.batch)
    while progress.epoch < settings.epochs and not _stalled(progress, settings):
        model.train()
        loss = 0.0
        for step, (pixels, labels) in enumerate(_shuffled(images, settings, progress.epoch)):
            rate = _cosine((progress.epoch * steps + step) / (settings.epochs * steps)) * settings.lr
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = logits_of(prepared(pixels.to(device))).float()
            value = nn.functional.cross_entropy(logits, labels.to(device), weight=weights)
            if not torch.isfinite(value):
                reached = float(value.detach())
                raise NumericalError(f"epoch {progress.epoch + 1}: the loss is {reached}", "lower the option lr")
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
            after_step(rate)
            loss += float(value.detach()) * len(labels) / len(images)
        model.eval()
        _note(progress, loss, model, validation, best, device)
        _save(folder, model, optimizer, best, progress)
        told(_line(progress, settings))
    accelerator.free_memory()
    if best:
        model.load_state_dict(best)
    model.eval()
    model.requires_grad_(False)
    return progress


def class_weights(images: Pixels, device: torch.device) -> Tensor:
    """Return `images / (classes * images of the class)`, float32 `[classes]`; 0 for a class without images."""
    counts = images.images.subset(torch.arange(len(images))).counts.double()
    present = int((counts > 0).sum())
    return torch.where(counts > 0, len(images) / (present * counts.clamp_min(1)), 0).float().to(device)


def recalibrate(model: nn.Module, images: Pixels, indices: Tensor, device: torch.device, batch: int = 64) -> int:
    """Compute the running statistics of batch normalization anew; returns how many layers have any.

    Args:
        model: In eval mode; nothing but those statistics changes.
        images: To compute them from.
        indices: Which of the images.
        device: Where the model is.
        batch: Images per forward pass; every pass counts the same, so the last one may not be small.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the passes
        norm.train()
    with torch.no_grad():
        for part in indices.chunk(max(len(indices) // batch, 1)):
            model(images[part].to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(norms)


def shifted(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return images each shifted and flipped at random; what a shift uncovers repeats the border."""
    count, _, height, width = images.shape
    if "shift" in augment:
        reach = max(height // 8, 1), max(width // 8, 1)
        dy, dx = (torch.randint(-r, r + 1, (count, 1), generator=generator) for r in reach)
        rows = (torch.arange(height) + dy).clamp(0, height - 1)  # [images, height]
        columns = (torch.arange(width) + dx).clamp(0, width - 1)  # [images, width]
        images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        images = images.permute(0, 3, 1, 2)
    if "flip" in augment:
        flip = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    return images


def _shuffled(images: Pixels, settings: Training, epoch: int) -> Any:
    """Yield one epoch of batches; a last one of a single image, which batch normalization cannot take, is left out."""
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    for pixels, labels in images.batches(settings.batch, order):
        if len(labels) > 1:
            yield shifted(pixels, settings.augment, generator), labels


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _stalled(progress: Progress, settings: Training) -> bool:
    idle = progress.epoch - progress.best_epoch
    return progress.best is not None and 0 < settings.patience <= idle


def _note(
    progress: Progress,
    loss: float,
    model: nn.Module,
    validation: Pixels | None,
    best: dict[str, Tensor],
    device: torch.device,
) -> None:
    """Count an epoch, and keep its parameters if they are the best yet."""
    progress.epoch += 1
    entry = {"loss": loss}
    if validation is not None:
        score = evaluate(model, validation, device).balanced_accuracy
        entry["balanced_accuracy"] = score
        if progress.best is None or score > progress.best:
            progress.best, progress.best_epoch = score, progress.epoch
            best.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    progress.history.append(entry)


def _line(progress: Progress, settings: Training) -> str:
    entry = progress.history[-1]
    seen = f", validation {entry['balanced_accuracy']:.4f}" if "balanced_accuracy" in entry else ""
    return f"epoch {progress.epoch}/{settings.epochs}: loss {entry['loss']:.4f}{seen}"


def _touch(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its momentum buffer now, so that a saved one has a place to go."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _momenta(optimizer: Any) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]


def _save(folder: Path | None, model: nn.Module, optimizer: Any, best: dict[str, Tensor], progress: Progress) -> None:
    """Save tensors first, then what says that they are there; a run killed between the two repeats an epoch."""
    if folder is None:
        return
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    tensors |= {f"momentum.{index}": tensor for index, tensor in enumerate(_momenta(optimizer))}
    name = f"{progress.epoch}-{TENSORS}"
    try:
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_tensors(folder / name, held)
        state = {"epoch": progress.epoch, "history": progress.history, "tensors": name}
        state |= {"best": progress.best, "best_epoch": progress.best_epoch}
        temporary = folder / f".{STATE}"
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(folder / STATE)
        for old in folder.glob(f"*-{TENSORS}"):
            if old.name != name:
                old.unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


def _restore(folder: Path | None, model: nn.Module, optimizer: Any, best: dict[str, Tensor]) -> Progress | None:
    """Put a saved state back, if there is one."""
    if folder is None or not (folder / STATE).is_file():
        return None
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    tensors = load_file(folder / state["tensors"])
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "momentum": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    model.load_state_dict(parts["model"])
    best.update(parts["best"])
    for index, buffer in enumerate(_momenta(optimizer)):
        buffer.copy_(parts["momentum"][str(index)])
    return Progress(state["epoch"], state["history"], state["best"], state["best_epoch"])
