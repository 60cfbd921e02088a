"""What the model needs: its parameters, which tensor on disk fills which, and what kind of layer each belongs to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.checkpoint.blocks import BlockSequence, Trace
from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.checkpoint.source import TensorInfo
from compressor.errors import UnsupportedError
from compressor.plan import Kind
from compressor.stacks import is_expert_stack
from compressor.weights import kind_of


@dataclass(frozen=True)
class Model:
    """A model on the meta device.

    Attributes:
        skeleton: The model.
        targets: Dense name on disk (`<module>.weight` for packed ones) -> its place.
        expected: Parameters and buffers that must be filled, on meta.
        trace: Who reads what; experts only, where the forward pass could not be traced.
        traced: Whether the forward pass could be traced; if not, routers are not recognised.
    """

    skeleton: Skeleton
    targets: Mapping[str, Target]
    expected: Mapping[str, Any]
    trace: Trace
    traced: bool

    @property
    def module(self) -> Any:
        """The transformers model."""
        return self.skeleton.model

    def shape_of(self, name: str) -> tuple[int, int] | None:
        """Return the matrix shape a tensor must have, or None if it has no place or is no matrix."""
        target = self.targets.get(name)
        if target is None or target.param is None or not target.simple:
            return None
        param, where = self.expected[target.param], target.where
        if where.expert is not None and where.expert >= param.shape[0]:
            return None  # an expert the model does not have
        shape = tuple(where.of(param).shape)
        if len(shape) == 4:
            return shape[0], math.prod(shape[1:])  # a convolution is packed as one row per filter
        return (shape[0], shape[1]) if len(shape) == 2 else None

    def kind(self, name: str) -> Kind:
        """Return what kind of weight a tensor is."""
        target = self.targets.get(name)
        if target is None or target.param is None:
            return Kind.OTHER
        shape = tuple(self.expected[target.param].shape)
        if len(shape) == 3:
            shape = shape[1:]
        return kind_of(target.param, TensorInfo(name, "BF16", shape, 0, ""), target, self.skeleton, self.trace)

    def stack_of(self, name: str) -> str | None:
        """Return the module of the experts stack a tensor belongs to, or None."""
        target = self.targets.get(name)
        owner = "" if target is None or target.param is None else target.param.rpartition(".")[0]
        return owner if owner in self.trace.experts else None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers by name in memory."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}

    @property
    def on_disk(self) -> dict[str, str]:
        """Parameter in memory -> name on disk, for those filled by exactly one tensor."""
        return {
            target.param: name
            for name, target in self.targets.items()
            if target.param is not None and target.simple and target.where.expert is None
        }

    @property
    def tied(self) -> dict[str, str]:
        """Parameter -> the parameter it is the same as."""
        return dict(self.module.all_tied_weights_keys)


def build_model(path: Path, shapes: Mapping[str, tuple[int, ...]], trust_remote_code: bool) -> Model:
    """Build the model a folder's config names.

    Args:
        path: The folder.
        shapes: Dense names on disk; of packed ones the row count is what matters.
        trust_remote_code: Run model code that comes with it.

    Raises:
        CheckpointError: Its config is not one transformers accepts.
        UnsupportedError: The architecture is unknown, or needs code that may not run.
    """
    skeleton = Skeleton.build(path, torch.device("cpu"), trust_remote_code)
    stacks = tuple(name for name, module in skeleton.model.named_modules() if is_expert_stack(module))
    trace, traced = Trace({}, stacks), False
    if stacks:  # only routers are told by what they read
        with contextlib.suppress(UnsupportedError):  # `traced` says so
            trace, traced = BlockSequence.find(skeleton.model).trace(), True
    expected = skeleton.model.state_dict(keep_vars=True)
    return Model(skeleton, skeleton.targets(shapes), expected, trace, traced or not stacks)
