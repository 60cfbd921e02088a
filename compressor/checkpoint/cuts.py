"""Modules with fewer channels than their class gives them: described as JSON, made again before weights are loaded.

A cut checkpoint stays a model of its own class. Its config says which modules are narrower and by how much, and whoever
loads it makes them so first: no pickled modules and no edited model classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError

CUTS = "cuts"
"""Key of `quantization_config` that holds the cuts of a native checkpoint."""

SIZES = (
    *("in_channels", "out_channels", "groups", "num_features", "num_channels"),
    *("in_features", "out_features", "normalized_shape"),
)
"""Attributes of modules that count channels; nothing else is ever set from a file."""


@dataclass(frozen=True)
class Widths:
    """How wide one module is.

    Attributes:
        sizes: Those of `SIZES` the module has.
        tensors: Its own parameters and buffers, with their shapes.
    """

    sizes: dict[str, int | list[int]]
    tensors: dict[str, list[int]]


def widths(model: nn.Module) -> dict[str, Widths]:
    """Return how wide every module is, by its name."""
    return {name: _widths(module) for name, module in model.named_modules()}


def difference(before: Mapping[str, Widths], model: nn.Module) -> dict[str, Any]:
    """Describe as JSON how a model differs from what it was.

    Args:
        before: What `widths` returned before channels were cut.
        model: The same model, cut.
    """
    modules: dict[str, Any] = {}
    for name, after in widths(model).items():
        old = before[name]
        sizes = {key: value for key, value in after.sizes.items() if value != old.sizes[key]}
        tensors = {key: shape for key, shape in after.tensors.items() if shape != old.tensors[key]}
        if sizes or tensors:
            modules[name] = {"sizes": sizes, "tensors": tensors}
    return {"version": 1, "modules": modules}


def cuts_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the cuts a `config.json` describes, or None.

    Raises:
        CheckpointError: They are damaged, or newer than this package.
    """
    section = config.get("quantization_config")
    found = section.get(CUTS) if isinstance(section, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("modules"), Mapping):
        raise CheckpointError("quantization_config: cuts are no description of modules", "config.json is damaged")
    if found.get("version") != 1:
        raise CheckpointError(
            f"quantization_config: version {found.get('version')!r} of cuts is unknown", "upgrade this package"
        )
    return found


def apply_cuts(model: nn.Module, cuts: Mapping[str, Any] | None) -> None:
    """Make modules as narrow as described; their tensors get the new shape and no particular values.

    Args:
        model: As its class builds it, on any device (meta included).
        cuts: What `cuts_of` returned; None changes nothing.

    Raises:
        CheckpointError: The description does not fit the model.
    """
    if cuts is None:
        return
    modules = dict(model.named_modules())
    for name, entry in cuts["modules"].items():
        if name not in modules:
            raise CheckpointError(f"cuts: the model has no module {name!r}", "does config.json belong to this model?")
        _narrow(name, modules[name], entry)


def _widths(module: nn.Module) -> Widths:
    sizes: dict[str, int | list[int]] = {}
    for key in SIZES:
        value = vars(module).get(key)  # its own: some wrappers show a part's width as a property
        if isinstance(value, int) and not isinstance(value, bool):
            sizes[key] = value
        elif isinstance(value, tuple) and all(isinstance(number, int) for number in value):
            sizes[key] = list(value)
    own = [*module._parameters.items(), *module._buffers.items()]
    return Widths(sizes, {key: list(tensor.shape) for key, tensor in own if tensor is not None})


def _narrow(name: str, module: nn.Module, entry: Any) -> None:
    old = _widths(module)
    sizes, tensors = (entry.get(part) if isinstance(entry, Mapping) else None for part in ("sizes", "tensors"))
    if not isinstance(sizes, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError(f"cuts: {name}: no sizes and tensors", "config.json is damaged")
    for key, value in sizes.items():
        _check(name, key, value, old.sizes.get(key))
        setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for key, shape in tensors.items():
        _check(name, key, shape, old.tensors.get(key))
        parameter, buffer = module._parameters.get(key), module._buffers.get(key)
        if parameter is not None:
            empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            module._parameters[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        elif buffer is not None:
            module._buffers[key] = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)


def _check(name: str, key: str, new: Any, old: int | list[int] | None) -> None:
    """Raise unless `new` is `old` with some of its numbers made smaller, none below 1."""
    numbers, limits = (value if isinstance(value, list) else [value] for value in (new, old))
    sound = isinstance(new, list) == isinstance(old, list) and len(numbers) == len(limits)
    sound = sound and all(
        type(n) is int and type(o) is int and 1 <= n <= o for n, o in zip(numbers, limits, strict=True)
    )
    if not sound:
        raise CheckpointError(
            f"cuts: {name}: {key} cannot become {new}, it is {old}", "does config.json belong to this model?"
        )
