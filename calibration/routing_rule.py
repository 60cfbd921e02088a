"""From a router's logits to choices: which experts it picks, and how much of each token it gives them.

Most routers share a token out by softmax; DeepSeek-V3's (arXiv 2412.19437, section 2.1.2) by sigmoids, with a bias that
counts for the choice alone and choices limited to a few groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class RoutingRule:
    """From logits `[tokens, experts]` to shares and choices.

    Attributes:
        sigmoid: Whether a share is the sigmoid of the expert's own logit, relative to all of them; else softmax.
        correction: `[experts]`, added to shares where experts are chosen; or None.
        groups: Number of groups of neighbouring experts.
        kept_groups: How many of them a token may choose from.
    """

    sigmoid: bool = False
    correction: Tensor | None = None
    groups: int = 1
    kept_groups: int = 1

    def log_shares(self, logits: Tensor) -> Tensor:
        """Return the logarithm of every expert's share of a token; shares add up to one."""
        # Shares are the softmax of the sigmoids' logarithms.
        shares: Tensor = (logsigmoid(logits) if self.sigmoid else logits).log_softmax(-1)
        return shares

    def scores(self, logits: Tensor) -> Tensor:
        """Return what experts are ranked by; `-inf` for those of groups a token may not choose from."""
        if self.correction is None and self.groups == 1:
            return logits
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        if self.correction is not None:
            scores = scores + self.correction.to(scores)
        if self.groups == 1:
            return scores
        members: Tensor = scores.unflatten(-1, (self.groups, -1))  # [tokens, groups, experts of a group]
        best = 1 if self.correction is None else min(2, members.shape[-1])  # DeepSeek-V2, and -V3
        of_group = members.topk(best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool)
        kept.scatter_(-1, of_group.topk(self.kept_groups, dim=-1).indices, value=True)
        return members.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


SOFTMAX = RoutingRule()
