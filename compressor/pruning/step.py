"""One step of iCBS on one tensor: choose a block, model it, solve it, change the mask.

Everything a step needs is the original weight, the mean gradient, and a way to get single samples' gradients of a few
entries, so that no `samples x weights` matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.pruning.candidates import Choice, TensorState, choose_block, choose_groups
from compressor.pruning.quadratic import Problem
from compressor.pruning.solvers import Solution, anneal, descend

Columns = Callable[[Tensor], Tensor]
"""Flat indices `[n]` of a tensor's entries -> gradients of single samples `[S, n]`, float32."""


@dataclass(frozen=True)
class Settings:
    """What the steps of a run have in common.

    Attributes:
        choice: How blocks are chosen.
        alpha: Factor of the mean gradient.
        ridge: What a squared change costs.
        solver: `anneal` builds the block's matrix; `descend` does not.
        restarts: Chains, or tries.
        sweeps: Temperatures of annealing.
        groups: M of a pattern N:M, or None.
    """

    choice: Choice
    alpha: float = 0.75
    ridge: float = 0.001
    solver: Literal["anneal", "descend"] = "descend"
    restarts: int = 4
    sweeps: int = 121
    groups: int | None = None


@dataclass(frozen=True)
class Step:
    """What a step found, before anyone has said that it counts.

    Attributes:
        state: The tensor's state with the block at rest, its mask unchanged.
        swaps: int64 `[swaps, 2]`, flat indices of the weight restored and the weight pruned, best first.
        energy: Of all swaps; never positive.
        predicted: The change of the mean loss that the model expects of all swaps.
        expected: `[S]` the change of each sample's loss it expects.
        n_pruned: Pruned weights in the block.
        n_kept: Kept weights in the block.
    """

    state: TensorState
    swaps: Tensor
    energy: float
    predicted: float
    expected: Tensor
    n_pruned: int
    n_kept: int

    def keep(self, share: float = 1.0) -> Tensor:
        """Return the mask `[out, in]` after the first `share` of the swaps."""
        chosen = self.swaps[: round(share * len(self.swaps))]
        keep = self.state.keep.clone()
        flat = keep.view(-1)
        flat[chosen[:, 0]], flat[chosen[:, 1]] = True, False
        return keep


def take_step(
    state: TensorState,
    w0: Tensor,
    gradient: Tensor,
    columns: Columns,
    settings: Settings,
    generator: torch.Generator,
    expected: Tensor | None = None,
) -> Step | None:
    """Decide one block of a tensor; None where one side has no candidates, or gradients are not finite.

    Args:
        state: The tensor's state.
        w0: `[out, in]` original weights.
        gradient: `[out, in]` mean gradient at the current weights.
        columns: Gives gradients of single samples.
        settings: Of the run.
        generator: For restarts.
        expected: `[S]` change of samples' losses that steps on other tensors will bring; None for none.
    """
    if not torch.isfinite(gradient).all():
        return None
    scores = (w0 * gradient).abs()
    if settings.groups:
        pruned, kept = choose_groups(state, scores, settings.choice, settings.groups)
    else:
        pruned, kept = choose_block(state, scores, settings.choice)
    if not len(pruned) or not len(kept):
        return None
    block = torch.cat([pruned, kept])
    mask = torch.zeros(len(block), dtype=torch.bool, device=block.device)
    mask[: len(pruned)] = True
    grads = columns(block)
    problem = Problem.of(w0.flatten()[block], mask, grads, settings.alpha, settings.ridge, expected)
    groups = None
    if settings.groups:
        groups = (block // settings.groups).unique(return_inverse=True)[1]
    solution = _solve(problem, settings, generator, groups)
    change = problem.grads @ problem.delta(solution.x)
    return Step(
        state=state.rest(pruned, kept, settings.choice),
        swaps=block[solution.swaps],
        energy=solution.energy,
        predicted=float(change.mean()) + float(change.square().mean()) / 2,
        expected=change,
        n_pruned=len(pruned),
        n_kept=len(kept),
    )


def _solve(problem: Problem, settings: Settings, generator: torch.Generator, groups: Tensor | None) -> Solution:
    if settings.solver == "anneal":
        return anneal(problem, settings.restarts, settings.sweeps, generator, groups)
    return descend(problem, settings.restarts, generator, groups)


def accepted(step: Step, share: float = 1.0) -> TensorState:
    """Return the state with the first `share` of a step's swaps carried out."""
    return replace(step.state, keep=step.keep(share))
