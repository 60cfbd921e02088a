"""Routers of a block, and running a stack of experts whose projections round their inputs, before it is packed.

A fused stack hands no projection's input to a hook, so its forward is replaced. The arithmetic and its order are those
of `runtime.PackedExperts`: what calibration sees is what the loaded checkpoint computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.calibration.coverage import Router
from compressor.calibration.routers import router_logits, routing_rule
from compressor.calibration.routing_rule import RoutingRule
from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.plan import Kind, LayerPlan, WeightRef
from compressor.stacks import expert_bias, gated_middle, stack_layout

Treat = Callable[[Tensor], Tensor]
"""What happens to the rows `[tokens, in]` a projection reads."""

Stack = dict[int, dict[str, Target]]
"""Expert -> role (`gate`, `up`, `down`) -> the part of the stack's parameters it is."""


def find_routers(layers: Iterable[LayerPlan], skeleton: Skeleton) -> dict[str, Router]:
    """Return expert stack -> what computes every expert's share of tokens from the block's weights as they are.

    A router lies beside its stack and has a row for every expert.
    """
    out: dict[str, Router] = {}
    for stack, ref in routers_of([layer.ref for layer in layers], skeleton).items():
        out[stack] = partial(_shares, skeleton.model.get_submodule(ref.owner), rule_of(ref, skeleton))
    return out


def routers_of(refs: Iterable[WeightRef], skeleton: Skeleton) -> dict[str, WeightRef]:
    """Return expert stack -> the weight of its router, for stacks whose router is known."""
    refs = list(refs)
    counts = {ref.owner: skeleton.model.get_parameter(ref.param).shape[0] for ref in refs if ref.role}
    routers = [ref for ref in refs if ref.kind is Kind.ROUTER]
    out: dict[str, WeightRef] = {}
    for stack, n_experts in counts.items():
        beside = f"{stack.rpartition('.')[0]}."
        mine = [ref for ref in routers if ref.shape[0] == n_experts and ref.param.startswith(beside)]
        if len(mine) == 1:
            out[stack] = mine[0]
    return out


def _shares(router: nn.Module, rule: RoutingRule, hidden: Tensor) -> Tensor:
    return rule.log_shares(router_logits(router, hidden)).exp()


def rule_of(ref: WeightRef, skeleton: Skeleton) -> RoutingRule:
    """Return how a router, whose block is loaded, chooses among experts."""
    around = skeleton.model.get_submodule(ref.owner.rpartition(".")[0])
    return routing_rule(skeleton.model.get_submodule(ref.owner), around)


def run_experts(
    module: nn.Module,
    stack: Stack,
    treat: Mapping[tuple[int, str], Treat],
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, `[tokens, hidden]`.

    Args:
        module: The stack; its parameters hold the weights that multiply the treated inputs.
        stack: Every projection of every expert.
        treat: Expert and role -> what happens to its input; others read their input as it is.
        hidden: `[tokens, hidden]`.
        top_k_index: `[tokens, k]` int64; indices past the last expert mean "none".
        top_k_weights: `[tokens, k]`.
    """
    tokens, k = top_k_index.shape
    dtype = torch.result_type(hidden, top_k_weights)
    out = hidden.new_zeros(tokens, k, hidden.shape[-1], dtype=dtype)
    for expert in top_k_index.unique().tolist():
        if expert in stack:
            token, slot = torch.where(top_k_index == expert)
            own = {role: treat[expert, role] for role in stack[expert] if (expert, role) in treat}
            value = _run_one(module, expert, stack[expert], own, hidden[token])  # [n, hidden]
            out[token, slot] = (value * top_k_weights[token, slot, None]).to(dtype)  # autocast may have narrowed it
    return out.sum(1).to(hidden.dtype)


def _run_one(module: Any, expert: int, parts: Mapping[str, Target], treat: Mapping[str, Treat], x: Tensor) -> Tensor:
    def project(role: str, rows: Tensor) -> Tensor:
        # Not get_parameter: while a block is learned, a tensor that is no parameter takes its place.
        weight = parts[role].where.of(getattr(module, str(parts[role].param).rpartition(".")[2]))  # [out, in]
        return functional.linear(treat[role](rows) if role in treat else rows, weight)

    layout = stack_layout(module)
    both = project("up", x)
    if layout.gated:
        both = layout.side_by_side(project("gate", x), both)
    bias = expert_bias(module, layout.leaf("up"), expert)
    out = project("down", gated_middle(module, both if bias is None else both + bias))
    bias = expert_bias(module, "down_proj", expert)
    return out if bias is None else out + bias
