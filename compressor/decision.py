"""What a method decides about one weight. The engine turns decisions into bytes; methods never touch files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from compressor.formats.base import QParams
from compressor.inputs import InputOp


@dataclass(frozen=True)
class Quantized:
    """Codes on a format's grid.

    Attributes:
        codes: uint8 `[out, in]`.
        qparams: The grid, in stored precision.
        inputs: What must happen to the layer's input at run time, in order; empty for weight-only methods.
        keep: bool `[out, in]`: False where the method pruned, and the codes mean zero; None if it prunes nothing.
    """

    codes: Tensor
    qparams: QParams
    inputs: tuple[InputOp, ...] = ()
    keep: Tensor | None = None


@dataclass(frozen=True)
class Masked:
    """Dense values, zero where the mask says so.

    Attributes:
        keep: bool `[out, in]`, False where the weight is pruned.
        values: float32 `[out, in]`, +0 where pruned; kept ones may have moved.
    """

    keep: Tensor
    values: Tensor


@dataclass(frozen=True)
class Kept:
    """The weight stays as it is, for a reason that goes into the report."""

    reason: str


Decision: TypeAlias = Quantized | Masked | Kept


@dataclass(frozen=True)
class Outcome:
    """What a method returns for the layers it was given.

    Attributes:
        decisions: Tensor name -> decision; one for every layer of the group.
        events: Sentences about fall-backs and surprises; each ends in the report.
        metrics: Numbers about the block, such as losses; they end in the report beside its time.
        rewrites: Name of a tensor that stays dense -> its new values, in the dtype and shape it has on disk.
    """

    decisions: Mapping[str, Decision]
    events: tuple[str, ...] = field(default=())
    metrics: Mapping[str, float] = field(default_factory=dict)
    rewrites: Mapping[str, Tensor] = field(default_factory=dict)
