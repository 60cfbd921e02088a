"""What routers compute: their logits, and the rule by which they choose, found out by running them on a few rows.

Nothing here knows a model class.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.calibration.routing_rule import SOFTMAX, RoutingRule

_PROBES = 64
_TOLERANCE = 1e-4
_CORRECTION = "e_score_correction_bias"
_GROUPS = (("num_group", "n_group"), ("topk_group",))
"""Names routers have for the number of groups, and for how many of them a token may choose from."""


def router_logits(router: nn.Module, hidden: Tensor) -> Tensor:
    """Return a router's logits, float32 `[tokens, experts]`, for rows `[tokens, hidden]`."""
    bias = dict(router.named_parameters(recurse=False)).get("bias")
    weight = router.get_parameter("weight").float()
    return functional.linear(hidden.float(), weight, None if bias is None else bias.float())


def routing_rule(router: nn.Module, around: nn.Module) -> RoutingRule:
    """Return the rule a router follows, found out by running it; softmax if none explains what it does.

    Args:
        router: Holds `weight` `[experts, hidden]`, real, and returns logits, routing weights and choices.
        around: The module it is part of, which may hold what belongs to it.
    """
    weight = router.get_parameter("weight")
    if weight.is_meta:
        return SOFTMAX
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBES, weight.shape[1], generator=generator).to(weight.device)
    with torch.no_grad():
        rows = rows / router_logits(router, rows).std().clamp_min(1e-6)  # far from where sigmoids are flat
        chosen = _choices(router, around, rows.to(weight.dtype))
        if chosen is None:
            return SOFTMAX
        logits = router_logits(router, rows.to(weight.dtype))
        return next((rule for rule in _candidates(router, around) if _explains(rule, logits, *chosen)), SOFTMAX)


def _choices(router: nn.Module, around: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the router's own routing weights and choices, `[tokens, k]` each, or None if it is another kind."""
    correction = _correction(router, around)
    for further in ((), () if correction is None else (correction,)):
        try:
            out = router(rows, *further)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            continue
        if isinstance(out, tuple) and len(out) == 3 and all(isinstance(part, Tensor) for part in out):
            _, weights, indices = out
            if weights.shape == indices.shape and indices.ndim == 2 and not indices.is_floating_point():
                return weights, indices
    return None


def _candidates(router: nn.Module, around: nn.Module) -> Iterator[RoutingRule]:
    correction = _correction(router, around)
    groups, kept = (_number(router, around, names) for names in _GROUPS)
    splits = [(1, 1)] if groups <= 1 or router.get_parameter("weight").shape[0] % groups else [(groups, kept), (1, 1)]
    for sigmoid, bias, (n, k) in product((False, True), {id(b): b for b in (correction, None)}.values(), splits):
        yield RoutingRule(sigmoid, bias, n, k)


def _explains(rule: RoutingRule, logits: Tensor, weights: Tensor, indices: Tensor) -> bool:
    """Return whether a rule gives the choices and, up to a factor for each token, the routing weights of a router."""
    k = indices.shape[-1]
    mine = rule.scores(logits).topk(k, dim=-1).indices.sort(-1).values
    order = indices.sort(-1)
    shares = rule.log_shares(logits).exp().gather(-1, order.values)
    theirs = weights.float().gather(-1, order.indices)
    if not torch.equal(mine, order.values):
        return False
    shares, theirs = (part / part.sum(-1, keepdim=True) for part in (shares, theirs))
    return bool(torch.allclose(shares, theirs, atol=_TOLERANCE))


def _correction(router: nn.Module, around: nn.Module) -> Tensor | None:
    for owner in (router, around):
        own = {**dict(owner.named_buffers(recurse=False)), **dict(owner.named_parameters(recurse=False))}
        if (found := own.get(_CORRECTION)) is not None and not found.is_meta:
            return found.detach().float()
    return None


def _number(router: nn.Module, around: nn.Module, names: tuple[str, ...]) -> int:
    values = (getattr(owner, name, None) for owner in (router, around) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)
