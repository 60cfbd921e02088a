"""Puts packed modules, still empty, into a model that transformers is about to fill by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.checkpoint import operands
from compressor.checkpoint.cuts import apply_cuts, cuts_of
from compressor.checkpoint.skeleton import META, Skeleton, Target, without_expert_merging
from compressor.errors import CheckpointError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.native import NativeSchemes, Steps
from compressor.inputs import InputOp, rebuild, stored_slots
from compressor.plan import role_of
from compressor.runtime.convolution import PackedConv2d
from compressor.runtime.embedding import PackedEmbedding, tie_heads
from compressor.runtime.modules import PackedExperts, PackedLinear
from compressor.stacks import stack_layout


def swap_native(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """Make modules as narrow as a native config says, and replace those it lists by their packed form, on meta.

    Raises:
        CheckpointError: The config lists modules the model does not have.
    """
    schemes = NativeSchemes.parse(config)
    apply_cuts(model, cuts_of({"quantization_config": config}))
    if schemes.attention_format:
        operands.prepare_empty(model, schemes.attention, schemes.attention_format)
    # Only an expert's place in its stack depends on shapes, and only on whether gate comes before up.
    targets = Skeleton(model, META).targets({f"{module}.weight": (1, 1) for module in schemes.modules})
    dtype = model.dtype
    experts: dict[str, list[tuple[str, Target, QuantFormat, Steps]]] = {}
    for module in schemes.modules:
        target = targets[f"{module}.weight"]
        fmt = schemes.find((module,), dtype)
        if target.param is None or fmt is None:
            raise CheckpointError(f"{module}: is listed as packed, but the model has no such weight", "wrong config?")
        owner = target.param.rpartition(".")[0]
        if target.where.expert is not None:
            experts.setdefault(owner, []).append((module, target, fmt, schemes.steps((module,))))
            continue
        linear = model.get_submodule(owner)
        if isinstance(linear, nn.Conv2d):
            packed = empty_packed(fmt, (linear.out_channels, linear.weight[0].numel()))
            model.set_submodule(owner, PackedConv2d(packed, fmt, linear, dtype))
            continue
        if isinstance(linear, nn.Embedding):
            packed = empty_packed(fmt, (linear.num_embeddings, linear.embedding_dim))
            model.set_submodule(owner, PackedEmbedding(packed, fmt, linear, dtype))
            continue
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{module}: is listed as packed, but is a {type(linear).__name__}", "wrong config?")
        packed = empty_packed(fmt, (linear.out_features, linear.in_features))
        inputs = empty_inputs(schemes.steps((module,)), (linear.out_features, linear.in_features), dtype)
        model.set_submodule(owner, PackedLinear(packed, fmt, linear.bias, inputs, dtype))
    tie_heads(model)
    for owner, members in experts.items():
        model.set_submodule(owner, _empty_experts(model.get_submodule(owner), members, dtype))


def empty_packed(fmt: QuantFormat, shape: tuple[int, int]) -> PackedTensor:
    """Return a packed tensor of this shape on meta."""
    slots = fmt.layout(shape).items()
    tensors = {suffix: torch.empty(slot.shape, dtype=slot.dtype, device=META) for suffix, slot in slots}
    return PackedTensor(fmt.name, shape, tensors)


def empty_inputs(steps: Sequence[dict[str, object]], shape: tuple[int, int], dtype: torch.dtype) -> tuple[InputOp, ...]:
    """Return what happens to a layer's input, tensors on meta."""
    slots = stored_slots(steps, shape, dtype).items()
    return rebuild(steps, {suffix: torch.empty(slot.shape, dtype=slot.dtype, device=META) for suffix, slot in slots})


def without_stacking(conversions: list[Any], model: nn.Module) -> list[Any]:
    """Drop the conversions that merge experts into stacks if the model keeps them packed one by one."""
    packed = any(isinstance(module, PackedExperts) for module in model.modules())
    return without_expert_merging(conversions) if packed else conversions


def _empty_experts(
    stack: nn.Module, members: list[tuple[str, Target, QuantFormat, Steps]], dtype: torch.dtype
) -> PackedExperts:
    layers: dict[int, dict[str, PackedLinear]] = {}
    roles: dict[str, str] = {}
    layout = stack_layout(stack)
    for module, target, fmt, steps in members:
        assert target.param is not None
        assert target.where.expert is not None
        leaf, fused = module.rpartition(".")[2], target.param.rpartition(".")[2]
        role = role_of(target.param, target.where)
        assert role is not None
        place = layout.where(role, 0, tuple(stack.get_parameter(fused).shape))
        rows, columns = place.of(stack.get_parameter(fused)).shape
        roles[role] = leaf
        inputs = empty_inputs(steps, (rows, columns), dtype)
        layer = PackedLinear(empty_packed(fmt, (rows, columns)), fmt, inputs=inputs, dtype=dtype)
        layers.setdefault(target.where.expert, {})[leaf] = layer
    # Its stacks are gone: nothing of it is left for transformers to initialize.
    stack._is_hf_initialized = True  # type: ignore[assignment]
    return PackedExperts(stack, [layers[index] for index in sorted(layers)], roles)
