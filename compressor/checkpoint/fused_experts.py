"""Stacks of experts that a checkpoint stores as one tensor, shown as one matrix per expert and projection.

GPT-OSS and others keep on disk what transformers keeps in memory: all experts of a layer in one 3-D tensor. A source
shows them one by one, under names of our own; every method then sees experts as it does elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from compressor.checkpoint.mxfp4_stacks import MXFP4Stack
from compressor.checkpoint.skeleton import Skeleton, Target, expert_name
from compressor.checkpoint.source import DTYPES, Source, TensorInfo
from compressor.plan import Where
from compressor.stacks import is_expert_stack, places, refuse_stack


@dataclass(frozen=True)
class StackPart:
    """One projection of one expert.

    Attributes:
        stack: The whole stack.
        index: The expert.
        where: Which part of the stack it is.
        packed: How the stack, or an entry of it, is made from what is on disk; None if it is stored as such.
    """

    stack: TensorInfo
    index: int
    where: Where
    packed: MXFP4Stack | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        return (self.stack.name,) if self.packed is None else self.packed.parts

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return `[out, in]` from the expert's entry of the stack."""
        entry = tensors[self.stack.name] if self.packed is None else self.packed.decode(tensors)
        part: Tensor = replace(self.where, expert=None).of(entry)
        return part.contiguous()


def split_experts(source: Source, skeleton: Skeleton) -> Source:
    """Return a source that shows stacks of experts one by one, where their layout is known; others stay as they are.

    Args:
        source: The checkpoint.
        skeleton: Its model.
    """
    targets = skeleton.targets({name: info.shape for name, info in source.tensors.items()})
    on_disk = {target.param: name for name, target in targets.items() if _is_whole(target)}
    tensors, decoders = dict(source.tensors), dict(source.decoders)
    for owner, module in skeleton.model.named_modules():
        if not is_expert_stack(module) or refuse_stack(module):
            continue
        parts = [(expert_name(owner, expert, role), f"{owner}.{leaf}", w) for expert, role, leaf, w in places(module)]
        stacks = {param: on_disk.get(param) for _, param, _ in parts}
        if not all(_fits(source, stack, skeleton.model.get_parameter(param)) for param, stack in stacks.items()):
            continue
        for name, param, where in parts:
            info, shape = source.tensors[str(stacks[param])], where.of(skeleton.model.get_parameter(param)).shape
            nbytes = shape.numel() * DTYPES[info.dtype].itemsize
            assert where.expert is not None
            tensors[name] = TensorInfo(name, info.dtype, tuple(shape), nbytes, info.file)
            packed = source.decoders.get(info.name)
            assert packed is None or isinstance(packed, MXFP4Stack)
            decoders[name] = StackPart(info, where.expert, where, packed)
        for stack in stacks.values():
            del tensors[str(stack)]
    if len(decoders) == len(source.decoders):
        return source
    return replace(source, tensors=tensors, stored=source.stored or source.tensors, decoders=decoders)


def stack_of(source: Source, name: str) -> TensorInfo | None:
    """Return the stack that a tensor shown by `split_experts` is part of, or None for other tensors."""
    decoder = source.decoders.get(name)
    return decoder.stack if isinstance(decoder, StackPart) else None


def rejoined(source: Source, names: Iterable[str]) -> Source:
    """Return a source that shows these tensors, some of which are stacks that `split_experts` took apart."""
    stacks = {stack.name: stack for name in source.tensors if (stack := stack_of(source, name)) is not None}
    return replace(source, tensors={name: source.tensors.get(name) or stacks[name] for name in names})


def _is_whole(target: Target) -> bool:
    return target.param is not None and target.simple and not target.split and target.where == Where()


def _fits(source: Source, name: str | None, param: Tensor) -> bool:
    """Return whether a tensor on disk is the whole stack, stored as such."""
    if name is None or not isinstance(source.decoders.get(name), MXFP4Stack | None):
        return False
    return source.tensors[name].shape == tuple(param.shape)
