"""What Beta-Rank needs to know of a layer: the spread of its input patches and of its filters' outputs, per position.

Beta-Rank (arXiv 2304.07461), the ranking value. The spread of a patch needs only sums over the window of the input and
its square, so one forward pass over the ranking images is all it costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import CoverageError, UnsupportedError


@dataclass(frozen=True)
class Spread:
    """Standard deviations of one layer (population ones: divided by the count).

    Attributes:
        inputs: Over images, channels and window of the patch at each output position, float32 `[groups, positions]`.
        outputs: Over images, before normalization and activation, float32 `[out, positions]`.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass
class _Sums:
    """Running sums of one layer; float64, so that a large mean does not swallow a small spread."""

    images: int = 0
    patch_values: int = 0
    inputs: Tensor | None = None  # [groups, positions]
    squares: Tensor | None = None  # [groups, positions]
    mean: Tensor | None = None  # [out, positions]
    deviations: Tensor | None = None  # [out, positions], sums of squared distances from the mean

    def add(self, layer: nn.Module, x: Tensor, z: Tensor) -> None:
        """Add a batch: what entered the layer and what left it."""
        x, z = _as_image(layer, x), _as_image(layer, z)
        inputs, squares, values = _patch_sums(layer, x)
        if inputs.shape[1] != z[0, 0].numel():
            raise UnsupportedError(f"a layer of {inputs.shape[1]} positions gave {z[0, 0].numel()} outputs")
        if self.mean is not None and self.mean.shape != z.flatten(2).shape[1:]:
            raise UnsupportedError("ranking images differ in size", "give the model images of one size")
        self.inputs = inputs if self.inputs is None else self.inputs + inputs
        self.squares = squares if self.squares is None else self.squares + squares
        self.patch_values += values * len(x)
        variance, mean = torch.var_mean(z.flatten(2).double(), dim=0, correction=0)  # [out, positions]
        deviations = variance * len(z)
        if self.mean is None or self.deviations is None:
            self.images, self.mean, self.deviations = len(z), mean, deviations
            return
        total = self.images + len(z)
        distance = mean - self.mean
        self.deviations = self.deviations + deviations + distance.square() * (self.images * len(z) / total)
        self.mean = self.mean + distance * (len(z) / total)
        self.images = total

    def spread(self) -> Spread:
        assert self.inputs is not None
        assert self.squares is not None
        assert self.deviations is not None
        mean = self.inputs / self.patch_values
        inputs = (self.squares / self.patch_values - mean.square()).clamp_min(0).sqrt()
        return Spread(inputs.float(), (self.deviations / self.images).sqrt().float())


@dataclass
class _Listener:
    """Collects sums of layers while a model runs."""

    sums: dict[str, _Sums] = field(default_factory=dict)

    def hook(self, name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            try:
                self.sums.setdefault(name, _Sums()).add(module, arguments[0], output)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error.message}", error.hint) from error

        return add


@torch.no_grad()
def measure_spread(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Spread]:
    """Run the ranking images through the model once and return the spread of every layer.

    Args:
        model: In eval mode.
        layers: Convolutions and linear layers of the model, by name. A linear layer is a 1 x 1 convolution over
            whatever lies between its batch and its features.
        batches: Images as the model takes them, `[n, channels, height, width]`.

    Raises:
        CoverageError: Fewer than two images, or a layer that never ran.
        UnsupportedError: A layer whose windows cannot be followed.
    """
    listener = _Listener()
    handles = [layer.register_forward_hook(listener.hook(name)) for name, layer in layers.items()]
    images = 0
    try:
        for batch in batches:
            images += len(batch)
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if images < 2:
        raise CoverageError(f"{images} ranking images: a spread over images needs 2", "give at least 64")
    if idle := sorted(set(layers) - set(listener.sums)):
        raise CoverageError(f"{idle[0]}: did not run on the ranking images", "leave it out with --skip")
    return {name: sums.spread() for name, sums in listener.sums.items()}


def _as_image(layer: nn.Module, x: Tensor) -> Tensor:
    """Return `[images, channels, height, width]`; what a linear layer takes has its features last."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)[..., None]
    return x


def _patch_sums(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the sums of input and squared input over images and window, and how many values one image's patch has.

    Padding counts as zeros, as in the convolution. Sums are float64 `[groups, positions]`.
    """
    if isinstance(layer, nn.Linear):
        sums, squares = (x.sum((0, 1), dtype=torch.float64), x.square().sum((0, 1), dtype=torch.float64))
        return sums.reshape(1, -1), squares.reshape(1, -1), x.shape[1]
    assert isinstance(layer, nn.Conv2d)
    window = torch.ones(1, 1, *layer.kernel_size, dtype=torch.float64, device=x.device)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    by_group = x.unflatten(1, (layer.groups, -1))  # [images, groups, in / groups, height, width]
    both = []
    for values in (by_group, by_group.square()):
        channels = values.sum((0, 2), dtype=torch.float64)[:, None]  # [groups, 1, height, width]
        both.append(F.conv2d(channels, window, None, layer.stride, padding, layer.dilation).flatten(1))
    return both[0], both[1], by_group.shape[2] * layer.kernel_size[0] * layer.kernel_size[1]
