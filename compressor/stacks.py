"""How the experts of a layer lie in one module: transformers v5 keeps them in 3-D parameters, not in linear layers.

Decorated classes say so themselves (transformers, `use_experts_implementation`): `gate_up_proj` `[experts, 2 * width,
hidden]` holds gate above up, unless rows of the two alternate, or matrices lie transposed, with or without biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedError
from compressor.plan import Where

FUSED = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the parameters that stack experts."""

BIASES = tuple(f"{name}_bias" for name in FUSED)
"""Names of the parameters that stack their biases, `[experts, out]`."""


@dataclass(frozen=True)
class StackLayout:
    """Where the projections of an expert lie in the parameters of its module.

    Attributes:
        transposed: Matrices are `[in, out]`.
        interleaved: Outputs of gate and up alternate, gate first; else all of gate come before all of up.
        biased: Projections have biases.
        gated: There is a gate.
    """

    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    gated: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        """The projections of an expert."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def leaf(self, role: str) -> str:
        """Return the parameter a projection is part of."""
        return "gate_up_proj" if self.gated and role != "down" else f"{role}_proj"

    def where(self, role: str, expert: int, shape: tuple[int, ...]) -> Where:
        """Return which part of its parameter, of this shape, a projection is."""
        rows: tuple[int, int] | None = None
        step = 1
        if self.gated and role != "down":
            both = shape[2] if self.transposed else shape[1]
            if self.interleaved:
                rows, step = (0 if role == "gate" else 1, both), 2
            else:
                rows = (0, both // 2) if role == "gate" else (both // 2, both)
        return Where(expert, rows, step, self.transposed)

    def side_by_side(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return `[..., 2 * width]` as the module's gating function expects it."""
        return torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)


def is_expert_stack(module: nn.Module) -> bool:
    """Return whether a module holds fused experts: 3-D `down_proj` and `gate_up_proj` (or `up_proj`) parameters."""
    params = dict(module.named_parameters(recurse=False))
    stacked = {name for name, param in params.items() if param.ndim == 3}
    return "down_proj" in stacked and bool(stacked & {"gate_up_proj", "up_proj"})


def refuse_stack(module: nn.Module) -> str | None:
    """Return why the experts of a module cannot be told apart, or None.

    transformers describes the layout by flags on decorated classes; without them it would have to be guessed.
    """
    for flag in ("has_gate", "is_transposed", "is_concatenated", "has_bias", "has_post_expert_norm"):
        if not hasattr(module, flag):
            return f"its experts do not say how they are stored (no {flag})"
    if module.has_post_expert_norm:
        return "experts with a norm behind them are not supported"
    return None


def stack_layout(module: nn.Module) -> StackLayout:
    """Return how the experts of a module are stored.

    Raises:
        UnsupportedError: In a way that is not known.
    """
    if reason := refuse_stack(module):
        raise UnsupportedError(
            f"{type(module).__name__}: {reason}", "leave the experts of this model uncompressed: --skip '*.experts.*'"
        )
    source: Any = module
    gated = bool(source.has_gate)
    return StackLayout(source.is_transposed, gated and not source.is_concatenated, source.has_bias, gated)


def places(module: nn.Module) -> Iterator[tuple[int, str, str, Where]]:
    """Yield every projection of every expert: its number, its role, the parameter it is part of, and which part."""
    layout = stack_layout(module)
    for expert in range(len(module.get_parameter("down_proj"))):
        for role in layout.roles:
            leaf = layout.leaf(role)
            yield expert, role, leaf, layout.where(role, expert, tuple(module.get_parameter(leaf).shape))


def gated_middle(module: nn.Module, both: Tensor) -> Tensor:
    """Return what `down` reads, `[..., width]`, from the outputs of gate and up as they are stored (or of up alone)."""
    source: Any = module
    middle: Tensor = source._apply_gate(both) if source.has_gate else source.act_fn(both)
    return middle


def expert_bias(module: nn.Module, leaf: str, expert: int | Tensor) -> Tensor | None:
    """Return an expert's bias `[out]` of one parameter, gate and up together as stored, or None if it has none.

    Of several experts, int64 `[n]`, the bias of each, `[n, out]`.
    """
    bias: Tensor | None = getattr(module, f"{leaf}_bias", None)  # a tensor while a block is learned
    return None if bias is None else bias[expert]
