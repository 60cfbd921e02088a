"""Rounding a router so that it keeps choosing the same experts.

Section 5 of the method, see `eaquant.md`: all rows share one clipping ratio, the one whose logits divert least from
the original's among the experts that matter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor.calibration.routing_rule import SOFTMAX, RoutingRule

Divergence = Literal["renorm", "truncated", "full"]

GRID = 101
"""Ratios that are tried, evenly from the least one to one."""


def ratios(least: float) -> list[float]:
    """Return the clipping ratios, smallest first."""
    return [least + index * (1 - least) / (GRID - 1) for index in range(GRID)]


def round_rows(weight: Tensor, bits: int, ratio: float | Tensor) -> Tensor:
    """Return a matrix rounded per row to `2^bits` even steps between its clipped ends, float32 `[out, in]`.

    Args:
        weight: `[out, in]`; the range of every row is made to hold zero.
        bits: Bits of one code.
        ratio: Share of the range that is covered; a number, or one for every row `[out, 1]`.
    """
    steps = 2**bits - 1
    low = weight.amin(1, keepdim=True).clamp(max=0) * ratio
    high = weight.amax(1, keepdim=True).clamp(min=0) * ratio
    scale = ((high - low) / steps).clamp(1e-5, 1e4)
    zero = (-low / scale).round().clamp(0, steps)
    rounded: Tensor = ((weight / scale).round().add_(zero).clamp_(0, steps) - zero) * scale
    return rounded


def counted(n_experts: int, k: int, share: float) -> int:
    """Return how many of the experts a token likes best count: `k`, and a share of the others, rounded down."""
    return k + int(share * (n_experts - k))


def divergence(logits: Tensor, rounded: Tensor, m: int, kind: Divergence, rule: RoutingRule = SOFTMAX) -> float:
    """Return the mean over tokens of the divergence of two routers' shares, over the `m` best experts, in nats.

    Args:
        logits: The original's, `[tokens, experts]`.
        rounded: The other's.
        m: Experts that count, the first ones that the original would choose; ties go to lower indices.
        kind: `truncated`: terms of the others are left out, so it may be negative; `renorm`: distributions over the `m`
            experts alone; `full`: all experts.
        rule: How the router shares tokens out.
    """
    logits, rounded = logits.double(), rounded.double()
    p, q = rule.log_shares(logits), rule.log_shares(rounded)
    if kind != "full":
        best = rule.scores(logits).argsort(dim=-1, descending=True, stable=True)[:, :m]
        p, q = p.gather(1, best), q.gather(1, best)
    if kind == "renorm":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(logits: Tensor, rounded: Tensor, k: int, rule: RoutingRule = SOFTMAX) -> float:
    """Return the mean share of a token's `k` experts that are still among its `k` best."""
    ours, theirs = (
        torch.zeros_like(values, dtype=torch.bool).scatter_(1, rule.scores(values).topk(k, -1).indices, value=True)
        for values in (rounded, logits)
    )
    return float((ours & theirs).sum(-1).double().mean()) / k


def align(
    weight: Tensor,
    x: Tensor,
    bits: int,
    m: int,
    least: float,
    kind: Divergence,
    rule: RoutingRule = SOFTMAX,
    bias: Tensor | None = None,
) -> float:
    """Return the clipping ratio of a router with the least divergence on inputs `x`; of equal ones the smallest.

    Args:
        weight: `[experts, hidden]` float32.
        x: `[tokens, hidden]`, inputs it was not rounded for.
        bits: Bits of one code.
        m: Experts that count.
        least: Smallest ratio.
        kind: Which divergence.
        rule: How the router chooses.
        bias: What it adds to logits, `[experts]`, or None.
    """
    logits = linear(x, weight, bias)
    best, lowest = 1.0, torch.inf
    for ratio in ratios(least):
        score = divergence(logits, linear(x, round_rows(weight, bits, ratio), bias), m, kind, rule)
        if score < lowest:
            best, lowest = ratio, score
    return best


def by_weights(weight: Tensor, bits: int, least: float) -> Tensor:
    """Return each row's clipping ratio with the least squared error of its weights, `[out, 1]`."""
    best = torch.ones_like(weight[:, :1])
    lowest = torch.full_like(best, torch.inf)
    for ratio in ratios(least):
        error = (round_rows(weight, bits, ratio) - weight).square().sum(1, keepdim=True)
        best, lowest = torch.where(error < lowest, ratio, best), torch.minimum(error, lowest)
    return best
