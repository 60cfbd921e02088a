"""What a model costs: multiply-adds, parameters, bytes, and measured time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def layer_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return the multiply-adds of every convolution and linear layer for one image; biases are free.

    Args:
        model: In eval mode.
        example: Images as it takes them; only the first is counted.
    """
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def add(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            # A convolution's filter covers [in / groups, height, width]; a linear layer's row all inputs.
            found[name] = found.get(name, 0) + output.numel() * layer.get_parameter("weight")[0].numel()

        return add

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count(name)) for name, layer in layers]
    try:
        model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image; everything else is free."""
    return sum(layer_macs(model, example).values())


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def latency(model: nn.Module, images: Tensor, seconds: float = 1.0, at_least: int = 5) -> float:
    """Return the median seconds of a forward pass, after two that do not count.

    Args:
        model: In eval mode.
        images: The batch to time.
        seconds: About how long to measure.
        at_least: Passes that are measured in any case.
    """
    times: list[float] = []
    ends = time.perf_counter() + seconds
    for turn in range(10_000):
        started = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        if turn >= 2:
            times.append(time.perf_counter() - started)
        if len(times) >= at_least and time.perf_counter() > ends:
            break
    return statistics.median(times)
