"""Deciding from file headers alone where every tensor of a checkpoint goes in the model.

Everything that could load into wrong or random weights is found here, before a weight is read: missing and unexpected
tensors, wrong shapes, dense weights beside packed ones, modules the config calls quantized but that are stored dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.checkpoint.source import Source
from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.base import QuantFormat
from compressor.formats.native import NativeSchemes
from compressor.formats.schemes import Schemes
from compressor.inputs import stored_slots
from compressor.plan import role_of
from compressor.runtime.stored import (
    PACKED,
    AnySchemes,
    KeyMismatch,
    check_stored,
    codes_name,
    format_of,
    owned_suffix,
    packed_modules,
)
from compressor.stacks import FUSED


@dataclass(frozen=True)
class PackedWeight:
    """One packed matrix.

    Attributes:
        module: Its module's name on disk; tensors are `<module>.<suffix>`.
        target: The parameter it replaces.
        fmt: How to read it.
        shape: `[out, in]`.
        steps: What happens to the input, in order, as JSON.
    """

    module: str
    target: Target
    fmt: QuantFormat
    shape: tuple[int, int]
    steps: tuple[dict[str, object], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors on disk."""
        suffixes = (*self.fmt.layout(self.shape), *stored_slots(self.steps, self.shape, torch.float32))
        return tuple(f"{self.module}.{suffix}" for suffix in suffixes)

    @property
    def role(self) -> str:
        """For an expert's projection: `gate`, `up` or `down`, by the part of the stack it fills; gate comes first."""
        role = role_of(str(self.target.param), self.target.where)
        assert role is not None, self
        return role


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    Attributes:
        dense: Parameter in memory -> tensors on disk it is made of.
        linears: Module in memory -> its packed weight.
        experts: Experts module in memory -> the packed weights of all its experts.
    """

    dense: dict[str, tuple[str, ...]]
    linears: dict[str, PackedWeight]
    experts: dict[str, tuple[PackedWeight, ...]]


def read_layout(model: PreTrainedModel, source: Source, schemes: AnySchemes | None, dtype: torch.dtype) -> Layout:
    """Assign every tensor on disk to a place in `model` (parameters on meta).

    Raises:
        CheckpointError: See the module docstring.
        UnsupportedError: A packed weight of a module that cannot stay packed.
    """
    modules = packed_modules(source)
    owned = {name for name in source.tensors if _owner(name) in modules}
    shapes = {name: info.shape for name, info in source.tensors.items() if name not in owned}
    # Mapping names needs the row count alone, which packing along the inputs leaves as it is.
    shapes |= {f"{module}.weight": source.tensors[codes_name(source, module)].shape for module in modules}
    targets = Skeleton(model, torch.device("cpu")).targets(shapes)
    expected = model.state_dict(keep_vars=True)
    weights: list[PackedWeight] = []
    dense: dict[str, list[str]] = {}
    unexpected: set[str] = set()
    for name, target in targets.items():
        module = name.removesuffix(".weight")
        if target.param is None:
            unexpected.add(codes_name(source, module) if module in modules else name)
        elif module in modules and name != module:
            weights.append(_packed_weight(module, target, expected, source, schemes, dtype))
        else:
            dense.setdefault(target.param, []).append(name)
    read = {name for weight in weights for name in weight.names}
    unexpected |= {name for name in owned - read if codes_name(source, str(_owner(name))) not in unexpected}
    linears, experts = _sort(weights, model)
    covered = {*dense, *(str(weight.target.param) for weight in weights)}
    _check_names(model, source.path, covered, unexpected, expected)
    _check_experts(experts, dense, expected, source.path)
    if isinstance(schemes, NativeSchemes):
        _check_listed(schemes, modules, source.path)
    elif schemes is not None:
        _check_targeted(model, schemes, linears, dense)
    return Layout({param: tuple(names) for param, names in dense.items()}, linears, experts)


def _owner(name: str) -> str | None:
    """Return the module a tensor would belong to if that is packed, or None for one that belongs to no such module."""
    module, _, suffix = name.rpartition(".")
    return module if owned_suffix(suffix) else None


def _packed_weight(
    module: str,
    target: Target,
    expected: Mapping[str, Any],
    source: Source,
    schemes: AnySchemes | None,
    dtype: torch.dtype,
) -> PackedWeight:
    place = target.where.of(expected[str(target.param)])
    place = place.flatten(1) if place.ndim == 4 else place  # a convolution: one row per filter
    if not target.simple or place.ndim != 2:
        raise UnsupportedError(
            f"{module}: fills {target.param} in a way that cannot stay packed",
            "only linear layers and experts that have all their projections can",
        )
    shape = (int(place.shape[0]), int(place.shape[1]))
    names = (module, str(target.param).removesuffix(".weight"))
    fmt = format_of(names, schemes, dtype)
    steps = schemes.steps(names) if schemes else ()
    check_stored(source, module, fmt, shape, steps)
    return PackedWeight(module, target, fmt, shape, steps)


def _sort(
    weights: Iterable[PackedWeight], model: PreTrainedModel
) -> tuple[dict[str, PackedWeight], dict[str, tuple[PackedWeight, ...]]]:
    """Split packed weights into those of linear layers and those of expert stacks."""
    linears: dict[str, PackedWeight] = {}
    experts: dict[str, list[PackedWeight]] = {}
    for weight in weights:
        name, _, leaf = str(weight.target.param).rpartition(".")
        if weight.target.where.expert is not None:
            experts.setdefault(name, []).append(weight)
            continue
        module = model.get_submodule(name)
        if type(module) not in (nn.Linear, nn.Conv2d, nn.Embedding) or leaf != "weight":
            raise UnsupportedError(
                f"{weight.module}: its class {type(module).__name__} is no plain linear layer, convolution or table, "
                "and cannot stay packed",
                "compress the model without this layer (--skip)",
            )
        linears[name] = weight
    return linears, {name: tuple(stack) for name, stack in experts.items()}


def _check_names(
    model: PreTrainedModel, path: Path, covered: set[str], unexpected: set[str], expected: Mapping[str, Any]
) -> None:
    """Compare what the model needs with what is there."""
    missing, unexpected = unexplained(model, covered, unexpected, set(expected))
    if missing or unexpected:
        raise KeyMismatch(path, missing, unexpected)


def unexplained(
    model: PreTrainedModel, covered: set[str], unexpected: set[str], expected: set[str]
) -> tuple[set[str], set[str]]:
    """Return the names that are missing and those that are unexpected for no good reason.

    Args:
        model: The model; its tied parameters count as one, and it may say that some names can be ignored.
        covered: Parameters and buffers that are filled.
        unexpected: Tensors on disk without a place.
        expected: Parameters and buffers that must be filled.
    """
    tied: dict[str, set[str]] = {}
    for name, other in model.all_tied_weights_keys.items():
        tied.setdefault(other, {other}).add(name)
    for family in tied.values():
        if family & covered:
            covered = covered | family
    ignored = _pattern(model._keys_to_ignore_on_load_unexpected)
    old_buffers = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")  # stored by older versions, computed now
    unexpected = {name for name in unexpected if not ignored.search(name) and not old_buffers.search(name)}
    return expected - covered, unexpected


def _check_experts(
    experts: Mapping[str, tuple[PackedWeight, ...]],
    dense: Mapping[str, Iterable[str]],
    expected: Mapping[str, Any],
    path: Path,
) -> None:
    """Raise unless every expert of a packed stack has every projection, all of them packed."""
    for stack, weights in experts.items():
        leaves = [leaf for leaf in FUSED if f"{stack}.{leaf}" in expected]
        for leaf in leaves:
            for other in dense.get(f"{stack}.{leaf}", ()):
                raise CheckpointError(
                    f"{other} is stored dense, but {weights[0].module} of the same experts is packed",
                    "store all experts of a layer packed, or none",
                )
        needed = {"up", "down"} | ({"gate"} if "gate_up_proj" in leaves else set())
        if absent := sorted(needed - {weight.role for weight in weights}):
            raise CheckpointError(
                f"{stack}: no expert has a packed {absent[0]} projection", "the checkpoint is incomplete"
            )
        count = expected[str(weights[0].target.param)].shape[0]
        have = {weight.module for weight in weights}
        siblings = {tuple(weight.module.rsplit(".", 2)[::2]) for weight in weights}
        every = {f"{head}.{index}.{leaf}" for head, leaf in siblings for index in range(count)}
        if every != have:
            codes = weights[0].names[0].removeprefix(weights[0].module)
            raise KeyMismatch(path, [m + codes for m in every - have], [m + codes for m in have - every])


def _pattern(patterns: Iterable[str] | None) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns or ()) or r"(?!)")


def _check_listed(schemes: NativeSchemes, modules: frozenset[str], path: Path) -> None:
    """Raise unless a native config lists exactly the modules that are stored packed."""
    listed = frozenset(schemes.modules)
    if listed != modules:
        raise KeyMismatch(path, [m + PACKED for m in listed - modules], [m + PACKED for m in modules - listed])


def _check_targeted(
    model: PreTrainedModel, schemes: Schemes, linears: Mapping[str, Any], dense: Mapping[str, Iterable[str]]
) -> None:
    """Raise if the config calls a linear layer quantized that is stored dense: other readers give it random weights."""
    on_disk = {param: next(iter(names)) for param, names in dense.items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in linears:
            continue
        stored = on_disk.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        classes = [cls.__name__ for cls in type(module).__mro__]
        groups = [schemes.group_of(known, classes) for known in dict.fromkeys((stored, name))]
        if groups[0] is not None and None not in groups:
            raise CheckpointError(
                f"{stored}: is stored dense, but {groups[0].name} of quantization_config targets it",
                'add it to "ignore" in config.json, or store it packed',
            )
