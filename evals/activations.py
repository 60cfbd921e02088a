"""Refusing to score a checkpoint whose inputs are meant to be rounded on a path that does not round them.

Such a score would be that of another, better model. `compressor.load` rounds them in every format it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compressor.checkpoint.source import read_json
from compressor.errors import UnsupportedError
from compressor.runtime import PackedLinear, execution_path


def check_activations(model: nn.Module, folder: Path) -> None:
    """Raise unless the model quantizes the inputs that its checkpoint says are quantized.

    Args:
        model: What `runtime.load` made of the checkpoint.
        folder: The checkpoint.

    Raises:
        UnsupportedError: It does not; the message names the path.
        CheckpointError: `config.json` cannot be read.
    """
    section = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(section, Mapping):
        return
    asking, others = _groups(section)
    if not asking:
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    dropped = [name for name, layer in layers.items() if not _quantizes(layer)]
    # With weight-only groups beside them, layers that quantize nothing may be meant so.
    if layers and (not dropped or (others and len(dropped) < len(layers))):
        return
    raise UnsupportedError(
        f"{folder}: {', '.join(asking)} quantize activations, which {execution_path(model)} does not",
        "a score without it would be that of another model; what can be run: compress list inputs",
    )


def _groups(section: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of groups that quantize activations, and of those that do not."""
    if section.get("quant_method") == "fp8":  # native FP8 quantizes its inputs as it runs, unless told otherwise
        return (["quantization_config (fp8)"], []) if section.get("activation_scheme", "dynamic") else ([], [])
    groups = section.get("config_groups")
    asking: list[str] = []
    others: list[str] = []
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        keys = ("input_activations", "output_activations")
        asks = isinstance(group, Mapping) and any(group.get(key) is not None for key in keys)
        (asking if asks else others).append(f"config_groups.{name}")
    return asking, others


def _quantizes(layer: PackedLinear) -> bool:
    return any(step.describe()["op"] in ("quantize", "float") for step in layer.inputs)
