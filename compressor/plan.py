"""What will happen to every tensor of a checkpoint, decided from file headers alone.

`planner.py` builds these; the engine executes them; `--dry-run` prints them. Nothing here reads a weight.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from compressor.formats import GroupSize

OUTSIDE = -1
"""Block index of weights that belong to no block: embeddings, the final norm, the head."""


class Kind(StrEnum):
    """What a weight is, which decides who may touch it."""

    LINEAR = "linear"
    CONV = "conv"
    EMBEDDING = "embedding"
    EXPERT = "expert"
    ROUTER = "router"
    OTHER = "other"
    """Norm gains, biases, position tables, buffers: nothing multiplies by them as by a matrix."""


@dataclass(frozen=True)
class Where:
    """Which part of a parameter one tensor on disk fills: `param[expert][rows, cols]`.

    Attributes:
        expert: Index into the first dimension of a fused expert stack; None when the tensor is the whole parameter.
        rows: `[start, stop)` along the first remaining dimension; None for all rows.
        step: Every how many-th of these rows it is.
        transposed: Whether an expert's matrix lies transposed in the parameter; rows count after turning it.
    """

    expert: int | None = None
    rows: tuple[int, int] | None = None
    step: int = 1
    transposed: bool = False

    def of(self, param: Any) -> Any:
        """Return the view of `param` (a tensor) this describes."""
        if self.expert is not None:
            param = param[self.expert]
        if self.transposed:
            param = param.T
        return param if self.rows is None else param[self.rows[0] : self.rows[1] : self.step]


@dataclass(frozen=True)
class WeightRef:
    """One tensor on disk and where it lives in memory. A fused expert stack yields one per expert and projection.

    Attributes:
        name: Name on disk, e.g. `model.layers.3.mlp.experts.7.up_proj.weight`.
        param: Parameter in memory, e.g. `model.layers.3.mlp.experts.gate_up_proj`; equal to `name` for most tensors.
        where: The part of `param` this tensor is.
        kind: See `Kind`.
        shape: The true shape on disk.
        matrix: The `[out, in]` view methods and formats work on (a convolution is `[out, in*kh*kw]`), or None.
        dtype: Dtype on disk, in safetensors spelling (`BF16`).
        block: Index in the block sequence, or `OUTSIDE`.
        fed_by: Weights with the same id read the same input tensor: they share statistics.
        fused_with: Weights with the same id are fused by runtimes: they share scheme and global scale.
        part: The part of a multimodal model, beside its language model, that it belongs to; else None.
        split: Whether the source stores it inside a stack of experts, so that its name on disk is one of ours.
        conv_groups: Groups of a convolution, each of which reads channels of its own; 1 for everything else.
    """

    name: str
    param: str
    where: Where
    kind: Kind
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    dtype: str
    block: int
    fed_by: str
    fused_with: str
    part: str | None = None
    split: bool = False
    conv_groups: int = 1

    @property
    def module(self) -> str:
        """Name of the module on disk: the tensor's name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def owner(self) -> str:
        """Name of the module in memory that holds the parameter."""
        return self.param.rpartition(".")[0]

    @property
    def role(self) -> str | None:
        """Of an expert's projection in a fused stack: `gate`, `up` or `down`; else None."""
        return role_of(self.param, self.where) if self.kind is Kind.EXPERT else None

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def role_of(param: str, where: Where) -> str | None:
    """Return what a part of a fused expert stack is: `gate`, `up` or `down`; None for other parameters.

    Gate comes before up where both are in one parameter.
    """
    if where.expert is None:
        return None
    leaf = param.rpartition(".")[2]
    if leaf != "gate_up_proj":
        return leaf.removesuffix("_proj")
    return "gate" if where.rows is not None and where.rows[0] == 0 else "up"


class Operand(StrEnum):
    """Tensors a method may quantize that are no layer's input."""

    QUERY_KEY = "query_key"
    PROBABILITY_VALUE = "probability_value"
    KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class ActivationSite:
    """An operand of attention that can be quantized, named by the module that computes it.

    Attributes:
        module: e.g. `model.layers.3.self_attn`.
        operand: Which product inside that module.
        block: Index in the block sequence.
        format: Format it is rounded to at run time, or None.
        kept_because: Why it stays in floating point; None exactly when `format` is set.
    """

    module: str
    operand: Operand
    block: int
    format: str | None
    kept_because: str | None

    def __post_init__(self) -> None:
        assert (self.format is None) != (self.kept_because is None), self.module


class FoldKind(StrEnum):
    """Between which operations a factor per channel can move."""

    NORM = "norm"
    """From a norm's gain into the layers that read its output."""
    PRODUCT = "product"
    """From the rows of a linear layer, past a product or a ReLU, into the columns of the next: up -> down."""
    EXPERTS = "experts"
    """From a norm's gain into everything that reads its output in a mixture of experts: their gate and up projections,
    those of shared experts, and the router."""
    VALUE = "value"
    """From the rows of the value projection, past attention, into the columns of the output projection."""


@dataclass(frozen=True)
class Fold:
    """A place where a producer may be divided by `c > 0` per channel if its readers' columns are multiplied by `c`.

    Attributes:
        name: Module that produces the channels (for an expert, its projection's module on disk).
        kind: What lies in between.
        block: Index in the block sequence.
        scaled: Tensor on disk whose entries or rows are divided: a norm's weight, or a matrix `[channels, in]`.
        bias: Tensor on disk that is divided with it, or None.
        readers: Tensors on disk, `[out, channels]`, all of them compressed, whose columns are multiplied.
        channels: Number of channels.
        offset: A norm multiplies by `offset + weight`; 0 for most, 1 for Gemma's. 0 for matrices.
        powers_of_two: Factors must be powers of two, as something that is stored with few bits is divided by them.
        shifted: The readers' biases, in their order, where a shift of the channels can move from the norm's bias into
            them: all of these biases exist in float32. Else empty.
        dense: Tensors on disk that read the channels too and stay dense, whose columns are multiplied and stored again.
    """

    name: str
    kind: FoldKind
    block: int
    scaled: str
    bias: str | None
    readers: tuple[str, ...]
    channels: int
    offset: float = 0.0
    powers_of_two: bool = False
    shifted: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """The fate of one tensor: a format, or the reason it stays as it is.

    Attributes:
        ref: The tensor.
        format: Format name, or None when the tensor is copied.
        group_size: Inputs per scale, `"tensor"` for one scale per matrix; None for one scale per row, or when the
            tensor is copied.
        bytes_before: Bytes on disk in the source.
        bytes_after: Bytes on disk in the result, scales included.
        kept_because: Why it stays dense; None exactly when `format` is set.
        rewritten_because: Which fold may change its values all the same; None if none does.
        inputs: Name of the format its inputs are rounded to, or None.
        inputs_kept_because: Why they are not although the recipe asks for it, or None.
        steps: What happens to its inputs, in order, as JSON; see `compressor.inputs.rebuild`.
        ranges: Whether the engine measures the range of its inputs for a static scale; if not, the method chooses it.
    """

    ref: WeightRef
    format: str | None
    group_size: GroupSize
    bytes_before: int
    bytes_after: int
    kept_because: str | None
    rewritten_because: str | None = None
    inputs: str | None = None
    inputs_kept_because: str | None = None
    steps: tuple[dict[str, object], ...] = ()
    ranges: bool = False

    def __post_init__(self) -> None:
        assert (self.format is None) != (self.kept_because is None), self.ref.name
        assert self.inputs is None or (self.format and not self.inputs_kept_because), self.ref.name
        assert (self.inputs is None) == (not self.steps), self.ref.name


@dataclass(frozen=True)
class Plan:
    """Everything the engine will do, sealed by `digest` once the calibration data is known.

    Attributes:
        architecture: Model class named in the config.
        layers: One entry per tensor of the source, in the order it will be written; nothing is left out.
        sites: Attention operands and why they stay in floating point.
        blocks: Module names of the streamed blocks, in order.
        method: Method name.
        format: Format of the layers no override names.
        inputs: Format of the inputs of the layers that have one, or None.
        batch_norm: What happens to running statistics behind rounded layers: `correct`, `reestimate`, or None.
        default_dtype: Dtype floating scales are stored in, in safetensors spelling.
        peak_bytes: Estimated peak of resident weights, statistics and activations while running.
        notes: Things the planner decided that a user may want to know.
        folds: Where the method may move factors between operations, in the order they are applied.
        unfolded: Compressed tensor -> why no factors reach it; empty for methods that move none.
        digest: SHA-256 over recipe, source, calibration data and package version; empty until sealed.
    """

    architecture: str
    layers: tuple[LayerPlan, ...]
    sites: tuple[ActivationSite, ...]
    blocks: tuple[str, ...]
    method: str
    format: str
    default_dtype: str
    peak_bytes: int
    notes: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()
    unfolded: Mapping[str, str] = field(default_factory=dict)
    inputs: str | None = None
    batch_norm: str | None = None
    digest: str = field(default="", compare=False)

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The layers that change."""
        return tuple(layer for layer in self.layers if layer.format)

    @property
    def bytes_before(self) -> int:
        """Source size in bytes, headers excluded."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Result size in bytes, headers excluded."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per compressed weight, scales included; 0 if nothing is compressed."""
        weights = sum(layer.ref.numel for layer in self.compressed)
        return 8 * sum(layer.bytes_after for layer in self.compressed) / weights if weights else 0.0

    def cached(self, block: int) -> tuple[str, ...]:
        """Return the attention modules of a block whose key/value cache is quantized."""
        return self._treated(Operand.KV_CACHE, block)

    def rounded_attention(self, block: int) -> tuple[str, ...]:
        """Return the attention modules of a block whose operands are rounded."""
        return self._treated(Operand.QUERY_KEY, block)

    def operand_format(self, operand: Operand) -> str | None:
        """Return the format of an operand of attention, or None if it stays in floating point everywhere."""
        return next((site.format for site in self.sites if site.operand is operand and site.format), None)

    def _treated(self, operand: Operand, block: int) -> tuple[str, ...]:
        return tuple(s.module for s in self.sites if s.block == block and s.operand is operand and s.format)

    @property
    def formats(self) -> tuple[tuple[str, GroupSize], ...]:
        """Name and group size of every format in use, in order of first use."""
        return tuple(dict.fromkeys((layer.format, layer.group_size) for layer in self.layers if layer.format))

    def in_block(self, block: int) -> tuple[LayerPlan, ...]:
        """Return the layers of one block (or of `OUTSIDE`), in writing order."""
        return tuple(layer for layer in self.layers if layer.ref.block == block)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, stable under `json.dumps(sort_keys=True)`."""
        return asdict(self)


def digest(parts: dict[str, Any]) -> str:
    """Return the SHA-256 of canonical JSON; the same parts give the same digest on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
