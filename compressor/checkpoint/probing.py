"""What a module computes, found out by running it on a few numbers: whether factors per channel pass through it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from compressor.stacks import refuse_stack, stack_layout

_TOLERANCE = 1e-5
"""Relative; norms compute in float32 whatever they are given."""


def norm_offset(module: nn.Module) -> float | None:
    """Return `o` if a module computes `(o + weight) * f(x) + bias` channel by channel, else None.

    Found out by running a copy of it with weights of our own; `f` may mix channels.

    Args:
        module: Any module whose parameters are `weight` `[channels]` and perhaps `bias`; may be on meta.
    """
    own = dict(module.named_parameters(recurse=False))
    if set(own) - {"bias"} != {"weight"} or any(p.ndim != 1 for p in own.values()) or list(module.children()):
        return None
    channels = own["weight"].shape[0]
    probe = copy.deepcopy(module).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(2, channels, dtype=torch.float64, generator=generator)

    def run(gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        probe.get_parameter("weight").data.copy_(gain)
        if "bias" in own:
            probe.get_parameter("bias").data.copy_(shift)
        out: torch.Tensor = probe(x)
        return out

    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    try:
        with torch.no_grad():
            nothing, unit, any_ = run(zeros, zeros), run(ones, zeros), run(weight, bias)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # it wants other arguments than one tensor: whatever it is, it is no norm
    base = unit - nothing
    if any_.shape != x.shape or not float(base.abs().max()) > 0:
        return None
    offset = round(float((nothing * base).sum() / base.square().sum()), 6)
    expected = (offset + weight) * base + (bias if "bias" in own else 0)
    fits = torch.allclose(any_, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return offset if fits and torch.allclose(nothing, offset * base, rtol=_TOLERANCE, atol=_TOLERANCE) else None


def gate_is_linear(stack: Any) -> bool:
    """Return whether what a stack's down projection reads is proportional to the product of up and its input.

    It is not where biases are added in between.

    Args:
        stack: A module of fused experts.
    """
    gate = getattr(stack, "_apply_gate", None)
    if gate is None or refuse_stack(stack) or stack.has_bias:
        return False
    layout = stack_layout(stack)
    generator = torch.Generator().manual_seed(0)
    first, up = 3 * torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    c = 0.5 + torch.rand(8, dtype=torch.float64, generator=generator)
    both, scaled = layout.side_by_side(first, up), layout.side_by_side(first, up / c)
    try:
        with torch.no_grad():
            return torch.allclose(gate(both), gate(scaled) * c, rtol=_TOLERANCE, atol=_TOLERANCE)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
