"""What each tensor of a checkpoint is, from headers and the empty model: its kind, block, and whom it belongs with."""

from __future__ import annotations

import math

from torch import nn

from compressor.checkpoint.blocks import BlockSequence, Trace
from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.checkpoint.source import TensorInfo
from compressor.plan import OUTSIDE, Kind, WeightRef

FUSED_SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Last names of layers that runtimes (vLLM) fuse into one matmul."""


def make_ref(info: TensorInfo, target: Target, skeleton: Skeleton, blocks: BlockSequence, trace: Trace) -> WeightRef:
    """Describe one tensor on disk: where it goes in memory, what it is, whom it shares its input with."""
    param = target.param or info.name
    block = blocks.index_of(param)
    module_name = param.rpartition(".")[0]
    kind = Kind.OTHER if target.param is None else kind_of(param, info, target, skeleton, trace)
    matrix = None
    if kind in (Kind.LINEAR, Kind.ROUTER, Kind.EMBEDDING) or (kind is Kind.EXPERT and len(info.shape) == 2):
        matrix = (info.shape[0], info.shape[1])
    elif kind is Kind.CONV:
        matrix = (info.shape[0], math.prod(info.shape[1:]))
    # Convolutions that read one tensor see different windows of it.
    fed_by = module_name if kind is Kind.CONV else trace.reads.get(module_name, module_name)
    if kind is Kind.EXPERT and target.where.expert is not None:
        side = "mid" if param.endswith("down_proj") else "in"
        fed_by = f"{module_name}#{target.where.expert}.{side}"
    return WeightRef(
        name=info.name,
        param=param,
        where=target.where,
        kind=kind,
        shape=info.shape,
        matrix=matrix,
        dtype=info.dtype,
        block=OUTSIDE if block is None else block,
        fed_by=fed_by,
        fused_with=fused_id(info.name),
        part=None if target.param is None else blocks.beside(param),
        split=target.split,
        conv_groups=_conv_groups(skeleton.model.get_submodule(module_name)),
    )


def _conv_groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def kind_of(param: str, info: TensorInfo, target: Target, skeleton: Skeleton, trace: Trace) -> Kind:
    """Say what a weight is, from the module that owns it and from what reads the same tensor as the experts do."""
    module_name, _, leaf = param.rpartition(".")
    module = skeleton.model.get_submodule(module_name)
    if module_name in trace.experts and len(module.get_parameter(leaf).shape) == 3:
        return Kind.EXPERT
    if leaf != "weight":
        return Kind.OTHER
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, nn.Conv2d):
        return Kind.CONV
    if len(info.shape) != 2:
        return Kind.OTHER
    for stack in trace.experts:
        same_input = trace.reads.get(module_name) == trace.reads.get(stack)
        experts = skeleton.model.get_submodule(stack).get_parameter("down_proj").shape[0]
        if same_input and info.shape[0] in (1, experts):
            return Kind.ROUTER  # chooses among experts, or gates the shared one
    return Kind.LINEAR if isinstance(module, nn.Linear) else Kind.OTHER


def fused_id(name: str) -> str:
    """Return the id shared by the layers a runtime fuses with this one; the layer's own name if none."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    for members in FUSED_SETS:
        if last in members:
            return f"{parent}.{'+'.join(members)}"
    return name


def reason_to_keep(ref: WeightRef) -> str | None:
    """Return why a tensor of this kind and place stays dense whatever the method, or None."""
    if ref.part is not None:
        return f"{ref.part}: only the language model of a multimodal model is compressed"
    if ref.kind is Kind.EMBEDDING:
        return "embedding: a table look-up, no matmul; often tied to the output head"
    if ref.kind is Kind.ROUTER:
        return "router: tiny, and an error in it sends tokens to other experts"
    if ref.kind is Kind.OTHER:
        return "not a matrix of a linear layer (norm, bias, table or buffer)"
    if ref.kind is Kind.EXPERT and ref.matrix is None:
        return "fused expert stack: stored as one 3-D tensor, and not to be split into experts"
    if ref.block == OUTSIDE:
        return "outside the blocks (output head or projection): readers expect it dense"
    return None


def can_be_chosen(ref: WeightRef) -> bool:
    """Return whether a tensor that stays dense by itself can be given a format by name: embeddings, the output head."""
    return ref.part is None and ref.block == OUTSIDE and ref.kind in (Kind.EMBEDDING, Kind.LINEAR)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts expert 2 before expert 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
