"""Which weights of a tensor are decided next: free ones that look wrongly placed and were not looked at lately.

iCBS, arXiv 2411.17796. The lowest-scoring pruned weights and the highest-scoring kept ones of the starting mask stay
fixed for the whole run. Of the others, a step takes the pruned weights with the largest and the kept weights with the
smallest `|w0 g|`, `g` at the current model. What a step has looked at is not looked at again for a while.

Differs from the authors' code: the list of weights that rest is bounded on each side of the mask, so that no side runs
out of candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.pruning.masks import clean


@dataclass(frozen=True)
class Choice:
    """How blocks are chosen.

    Attributes:
        block: Weights in a block.
        tabu: Share of the free weights of each side that rests after it was looked at.
        fixed_pruned: Share of the pruned weights that stay pruned.
        fixed_kept: Share of the kept weights that stay kept.
    """

    block: int
    tabu: float = 0.40
    fixed_pruned: float = 0.42
    fixed_kept: float = 0.35


@dataclass(frozen=True)
class TensorState:
    """The mask of one tensor on its way.

    Attributes:
        keep: bool `[out, in]`.
        free: bool `[out, in]`: False where the starting mask is final.
        rested_pruned: int32 flat indices looked at lately that were pruned then, oldest first.
        rested_kept: The same for those that were kept.
    """

    keep: Tensor
    free: Tensor
    rested_pruned: Tensor
    rested_kept: Tensor

    @classmethod
    def start(cls, scores: Tensor, keep: Tensor, choice: Choice, per_row: bool) -> TensorState:
        """Return the state of a starting mask `[out, in]` chosen by scores `[out, in]`."""
        empty = torch.empty(0, dtype=torch.int32)
        return cls(keep, free_weights(scores, keep, choice, per_row), empty, empty)

    def rest(self, pruned: Tensor, kept: Tensor, choice: Choice) -> TensorState:
        """Return the state after a step looked at these flat indices; the oldest ones wake up."""
        n_pruned, n_kept = int((self.free & ~self.keep).sum()), int((self.free & self.keep).sum())
        return replace(
            self,
            rested_pruned=_queue(self.rested_pruned, pruned, int(choice.tabu * n_pruned)),
            rested_kept=_queue(self.rested_kept, kept, int(choice.tabu * n_kept)),
        )


def free_weights(scores: Tensor, keep: Tensor, choice: Choice, per_row: bool) -> Tensor:
    """Return a mask of the weights that may change: neither among the lowest pruned nor the highest kept scores.

    Args:
        scores: `[out, in]`, what the starting mask was chosen by.
        keep: bool `[out, in]`, the starting mask.
        choice: Shares that are fixed.
        per_row: Whether shares are taken of each row or of the whole matrix.
    """
    shape = scores.shape
    rows = clean(scores) if per_row else clean(scores).reshape(1, -1)
    kept = keep.view_as(rows)
    # One ascending order with all pruned weights first: fixed ones are its two ends.
    order = rows.argsort(dim=1, stable=True)
    order = order.gather(1, kept.gather(1, order).int().argsort(dim=1, stable=True))
    n_kept = kept.sum(1, keepdim=True)
    n_pruned = kept.shape[1] - n_kept
    low = (n_pruned * choice.fixed_pruned).round()
    high = kept.shape[1] - (n_kept * choice.fixed_kept).round()
    place = torch.arange(kept.shape[1], device=scores.device)
    return torch.zeros_like(kept).scatter_(1, order, (place >= low) & (place < high)).view(shape)


def choose_block(state: TensorState, scores: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return flat indices of the pruned and of the kept weights to decide; either may be empty.

    Args:
        state: The tensor's state.
        scores: `[out, in]`, `|w0 g|`.
        choice: The block's size.
    """
    flat, keep, free = scores.flatten(), state.keep.flatten(), state.free.flatten()
    if int(free.sum()) > choice.block:
        awake = free.clone()
        awake[state.rested_pruned.long()] = False
        awake[state.rested_kept.long()] = False
    else:
        awake = free  # all of them fit
    pruned, kept = (awake & ~keep).nonzero()[:, 0], (awake & keep).nonzero()[:, 0]
    if awake is free:
        return pruned, kept
    half = choice.block // 2
    wrong_pruned = _top(flat[pruned], half, largest=True)
    wrong_kept = _top(flat[kept], choice.block - half, largest=False)
    return pruned[wrong_pruned], kept[wrong_kept]


def choose_groups(state: TensorState, scores: Tensor, choice: Choice, of: int) -> tuple[Tensor, Tensor]:
    """Return the same for masks that keep N of every `of` inputs: whole groups, those with most to gain.

    A group's gain is taken to be the largest score among its pruned weights less the smallest among its kept ones. Our
    extension: the paper has no patterns.
    """
    keep = state.keep.view(-1, of)
    table = scores.reshape(-1, of)
    best = table.masked_fill(keep, -torch.inf).amax(1) - table.masked_fill(~keep, torch.inf).amin(1)
    awake = torch.ones(len(keep), dtype=torch.bool, device=keep.device)
    count = max(choice.block // of, 1)
    if len(keep) > count:
        awake[torch.cat([state.rested_pruned, state.rested_kept]).long() // of] = False
    candidates = awake.nonzero()[:, 0]
    chosen = candidates[_top(best[candidates], count, largest=True)].sort().values
    members = (chosen.unsqueeze(1) * of + torch.arange(of, device=keep.device)).flatten()
    inside = state.keep.flatten()[members]
    return members[~inside], members[inside]


def _top(values: Tensor, count: int, largest: bool) -> Tensor:
    """Return the indices of the `count` largest or smallest values, ascending."""
    return values.topk(min(count, len(values)), largest=largest, sorted=False).indices.sort().values


def _queue(before: Tensor, added: Tensor, capacity: int) -> Tensor:
    """Append and drop the oldest."""
    joined = torch.cat([before, added.to(torch.int32).cpu()])
    return joined[max(len(joined) - capacity, 0) :]
