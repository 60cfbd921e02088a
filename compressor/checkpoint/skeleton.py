"""A model without weights: the class transformers would load, on the meta device, filled one unit at a time.

This is the only file that uses transformers' internal loading functions. They map names on disk to parameters in memory
(v5 stacks experts into 3-D parameters) and accept the keys of a single block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from compressor.checkpoint.building import building
from compressor.checkpoint.config import model_class, quiet, read_config
from compressor.checkpoint.cuts import apply_cuts, cuts_of
from compressor.checkpoint.source import read_json
from compressor.errors import CheckpointError, UnsupportedError
from compressor.plan import Where
from compressor.stacks import FUSED, is_expert_stack, places, refuse_stack

META = torch.device("meta")


@dataclass(frozen=True)
class Target:
    """Where a tensor on disk ends up in memory.

    Attributes:
        param: Parameter or buffer name in the model; None if the model has no place for it.
        where: The part of it the tensor fills.
        simple: False when transformers converts the values in a way that cannot be undone slice by slice.
        split: Whether transformers knows no tensor of this name: it is an expert of a stack stored as one tensor.
    """

    param: str | None
    where: Where
    simple: bool = True
    split: bool = False


class Skeleton:
    """A model on the meta device and the means to fill and empty parts of it.

    Attributes:
        model: The model, in eval mode. Parameters are float32 on meta until loaded; buffers that are not on disk
            (rotary tables) are real from the start.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._experts = _experts_of(model, self._converters)

    @classmethod
    def build(cls, path: Path, device: torch.device | None = None, trust_remote_code: bool = False) -> Skeleton:
        """Build the class named by `architectures` in `path/config.json`.

        Raises:
            CheckpointError: The config is not one transformers accepts.
            UnsupportedError: The architecture is unknown, needs remote code, or is an encoder-decoder.
        """
        config = read_config(path, trust_remote_code)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # the source decodes; transformers must not expect packed tensors
        cls_ = model_class(path, config, trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{cls_.__name__}: encoder-decoder models have two block stacks; not supported yet")
        with building(path):
            with torch.device(META), quiet():
                model = cls_(config)
            apply_cuts(model, cuts_of(read_json(path / "config.json")))
            skeleton = cls(model.eval(), device or torch.device("cpu"))
            skeleton._rebuild_buffers()
        return skeleton

    def targets(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Target]:
        """Map every tensor on disk to its place in memory.

        Args:
            shapes: Name on disk -> shape.
        """
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        converters = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        out: dict[str, Target] = {}
        for name in shapes:
            param, pattern = rename_source_key(name, self._renamings, self._converters, prefix, state)
            if param not in state and name in state:
                param, pattern = name, None
            if name in self._experts:
                out[name] = self._experts[name]
            elif param not in state:
                out[name] = Target(None, Where())
            elif pattern is None:
                out[name] = Target(param, Where())
            else:
                out[name] = _expert_target(param, name, pattern, converters[pattern], shapes)
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters from tensors named as on disk; values become float32.

        Raises:
            CheckpointError: A tensor has a shape the model does not expect, or conversion failed.
        """
        config = LoadStateDictConfig(
            device_map={"": str(self.device)}, dtype=torch.float32, weight_mapping=[*self._renamings, *self._converters]
        )
        known = {name: tensor for name, tensor in tensors.items() if name not in self._experts}
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, known, config)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            problem = [*info.mismatched_keys, *info.conversion_errors.values(), *info.error_msgs][0]
            raise CheckpointError(f"weights do not fit the model: {problem}", "does config.json belong to them?")
        for target, origin in self.model.all_tied_weights_keys.items():
            a, b = self._stored(target), self._stored(origin)
            if a is not None and b is not None and not torch.equal(a, b):
                raise CheckpointError(
                    f"{target} and {origin} are tied by config.json but stored with different values",
                    'set "tie_word_embeddings": false in config.json if both are meant',
                )
        self._load_experts({name: tensor for name, tensor in tensors.items() if name in self._experts})
        self.model.tie_weights()

    def _load_experts(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parts of stacks that transformers knows as one tensor each."""
        for name, tensor in tensors.items():
            target = self._experts[name]
            assert target.param is not None
            owner, _, leaf = target.param.rpartition(".")
            stack = self.model.get_parameter(target.param)
            if stack.is_meta:
                stack = nn.Parameter(torch.empty_like(stack, device=self.device), requires_grad=False)
                self.model.get_submodule(owner)._parameters[leaf] = stack
            part = self.part(target.param, target.where)
            if part.shape != tensor.shape:
                raise CheckpointError(
                    f"weights do not fit the model: {name} is {list(tensor.shape)}, not {list(part.shape)}",
                    "does config.json belong to them?",
                )
            part.copy_(tensor)

    def _stored(self, param: str) -> Tensor | None:
        """Return a parameter's values if it is loaded."""
        value = self.model.get_parameter(param)
        return None if value.is_meta else value

    def free(self, params: Iterable[str]) -> None:
        """Give the memory of these parameters back; buffers that are computed stay, whatever files hold of them."""
        for name in params:
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device=META), requires_grad=False)
            elif buffer is not None and leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.empty_like(buffer, device=META)

    def part(self, param: str, where: Where) -> Tensor:
        """Return the view of a loaded parameter that one tensor on disk fills; writing to it changes the model."""
        view: Tensor = where.of(self.model.get_parameter(param).data)
        return view

    def _rebuild_buffers(self) -> None:
        """Compute buffers that are not on disk (rotary tables, position ids), as `from_pretrained` does."""
        owners = {name.rpartition(".")[0] for name, _ in self.model.named_non_persistent_buffers()}
        for owner in sorted(owners):
            module = self.model.get_submodule(owner)
            for leaf in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(leaf)) is not None:
                    module._buffers[leaf] = torch.empty_like(buffer, device=self.device)
            with torch.no_grad():
                self.model._init_weights(module)


def expert_name(stack: str, expert: int, role: str) -> str:
    """Return our name on disk of a projection that transformers has none for."""
    return f"{stack}.{expert}.{role}_proj.weight"


def _experts_of(model: PreTrainedModel, converters: Iterable[WeightConverter]) -> dict[str, Target]:
    """Return the parts of the stacks of experts that files hold as one tensor each, by names of our own."""
    converted = [re.compile(pattern) for entry in converters for pattern in entry.target_patterns]
    out: dict[str, Target] = {}
    for stack, module in model.named_modules():
        if not is_expert_stack(module) or refuse_stack(module):
            continue
        if any(pattern.search(f"{stack}.{leaf}") for pattern in converted for leaf in FUSED):
            continue  # files hold something else
        for expert, role, leaf, where in places(module):
            out[expert_name(stack, expert, role)] = Target(f"{stack}.{leaf}", where, split=True)
    return out


def names_on_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn tensors named and stacked as in memory into those a checkpoint of this model's class holds."""
    # What the model itself remembers is how it was loaded, perhaps from another kind of file.
    remembered = model.__dict__.pop("_weight_conversions", None)
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    finally:
        if remembered is not None:
            model._weight_conversions = remembered


def without_expert_merging(conversions: Iterable[Any]) -> list[Any]:
    """Return a conversion table without the entries that stack per-expert tensors into one parameter."""
    return [
        entry
        for entry in conversions
        if not any(isinstance(operation, MergeModulelist) for operation in getattr(entry, "operations", None) or ())
    ]


def _expert_target(
    param: str, name: str, pattern: str, converter: WeightConverter, shapes: Mapping[str, tuple[int, ...]]
) -> Target:
    """Locate one expert's projection inside the stack it is merged into."""
    operations = [type(operation) for operation in converter.operations]
    plain = operations in ([MergeModulelist], [MergeModulelist, Concatenate])
    dims = [getattr(operation, "dim", None) for operation in converter.operations]
    expert = _index_at_star(name, pattern)
    if not plain or dims not in ([0], [0, 1]) or expert is None or len(shapes[name]) != 2:
        return Target(param, Where(), simple=False)
    if len(operations) == 1:
        return Target(param, Where(expert))
    # Concatenated along rows in the order of the converter's source patterns: gate, then up.
    start = 0
    for other in converter.source_patterns:
        if other == pattern:
            return Target(param, Where(expert, (start, start + shapes[name][0])))
        sibling = _replace_leaf(name, pattern, other)
        if sibling not in shapes:
            return Target(param, Where(), simple=False)
        start += shapes[sibling][0]
    return Target(param, Where(), simple=False)


def _index_at_star(name: str, pattern: str) -> int | None:
    """Return the number a name on disk has where the pattern has `*`."""
    tail = pattern.split("*", 1)[-1].rstrip("$")
    head, found, _ = name.rpartition(_unescape(tail)) if tail else (name, "", "")
    digits = head.rpartition(".")[2]
    return int(digits) if found and digits.isdecimal() else None


def _replace_leaf(name: str, pattern: str, other: str) -> str:
    """Return the name that `other` gives to the same expert's other projection."""
    mine, its = (_unescape(text.split("*", 1)[-1].rstrip("$")) for text in (pattern, other))
    head, found, tail = name.rpartition(mine)
    return head + its + tail if found else ""


def _unescape(text: str) -> str:
    return text.replace("\\.", ".")
