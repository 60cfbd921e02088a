"""Choosing which weights of a block are pruned: swaps of a pruned and a kept weight that lower a quadratic energy.

Every solver starts at the current mask, whose energy is 0, keeps the best it has seen, and keeps the number of pruned
weights. `exact` enumerates, for tests. `anneal` runs many chains of simulated annealing at once on a dense matrix, each
proposal in constant time, and polishes the best by steepest descent. `descend` never builds the matrix: each round
matches all pruned with all kept weights, sorts the pairs by what they gain, and takes as many as lower the exact energy
of all of them together.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.pruning.quadratic import Problem

MOST_ENUMERATED = 100_000

_LOW, _HIGH = 0.002, 200.0
"""Inverse temperatures of the first and the last sweep, for energies scaled to a mean entry of one."""

_ROUNDS = 200


@dataclass(frozen=True)
class Solution:
    """A decision.

    Attributes:
        x: bool `[n]`, True where the weight is pruned.
        energy: Its energy; never positive.
        swaps: int64 `[swaps, 2]`: the weight restored and the weight pruned, best first. Any first few of them
            are a valid decision too.
    """

    x: Tensor
    energy: float
    swaps: Tensor


def exact(problem: Problem) -> Solution:
    """Try every decision with as many pruned weights as now.

    Raises:
        ValueError: There are more than 100,000.
    """
    n, k = len(problem.w0), int(problem.pruned.sum())
    if math.comb(n, k) > MOST_ENUMERATED:
        raise ValueError(f"{math.comb(n, k)} decisions are too many to enumerate")
    chosen = torch.tensor(list(itertools.combinations(range(n), k)), dtype=torch.long).view(-1, k)
    x = torch.zeros(len(chosen), n, dtype=torch.bool).scatter_(1, chosen, True)
    energies = problem.energy(x)
    best = int(energies.argmin())
    if float(energies[best]) >= 0:
        return _unchanged(problem)
    return _solution(problem, x[best])


def anneal(
    problem: Problem, restarts: int, sweeps: int, generator: torch.Generator, groups: Tensor | None = None
) -> Solution:
    """Anneal `restarts` chains at once, then descend from the best.

    Args:
        problem: The block; its dense matrix is built.
        restarts: Chains.
        sweeps: Temperatures; each chain proposes `n` swaps at each.
        generator: Draws partners and acceptances.
        groups: int64 `[n]`: swaps stay within a group; None for swaps of any two.
    """
    q, _ = problem.matrix()
    scale = float(q[q != 0].abs().mean()) if bool((q != 0).any()) else 1.0
    seed = int(torch.randint(2**62, (1,), generator=generator))
    chains = _Chains(
        (q / scale).cpu().numpy(), problem.pruned.cpu().numpy(), restarts, np.random.default_rng(seed), groups
    )
    for beta in np.geomspace(_LOW, _HIGH, sweeps):
        if not chains.sweep(float(beta)):
            break
    x = torch.from_numpy(chains.best).to(problem.pruned.device)
    if float(problem.energy(x)) > 0:  # by rounding alone: chains start at zero
        x = problem.pruned
    return _polished(problem, x, q, groups)


class _Chains:
    """Chains of simulated annealing on one matrix, each with its field `f = 2 Q x`."""

    def __init__(
        self,
        q: NDArray[np.floating],
        start: NDArray[np.bool_],
        chains: int,
        rng: np.random.Generator,
        groups: Tensor | None,
    ) -> None:
        self.q, self.rng, self.n = q, rng, len(start)
        self.diagonal = q.diagonal().copy()
        self.x = np.repeat(start[None], chains, 0)
        self.field = 2 * self.x.astype(q.dtype) @ q
        self.energy = np.zeros(chains)
        self.best, self.best_energy = start.copy(), 0.0
        self.members: dict[int, NDArray[np.int64]] | None = None
        if groups is not None:
            ids = groups.numpy()
            self.members = {int(i): np.flatnonzero(ids == ids[i]) for i in range(self.n)}

    def sweep(self, beta: float) -> bool:
        """Propose a swap for every weight in every chain; return whether any chain moved."""
        moved = False
        rows = np.arange(len(self.x))
        draws = self.rng.random((self.n, 2, len(rows)))
        for i in range(self.n):
            partner = self._partner(i, draws[i, 0])
            p = np.where(self.x[:, i], i, partner)  # leaves the pruned set
            q = np.where(self.x[:, i], partner, i)  # enters it
            change = self.field[rows, q] - self.field[rows, p] + self.diagonal[p] + self.diagonal[q] - 2 * self.q[p, q]
            accept = (self.x[rows, p] != self.x[rows, q]) & (draws[i, 1] < np.exp(np.minimum(-beta * change, 0)))
            if not accept.any():
                continue
            chosen = rows[accept]
            p, q, change = p[accept], q[accept], change[accept]
            moved |= bool((change != 0).any())
            self.x[chosen, p], self.x[chosen, q] = False, True
            self.field[chosen] += 2 * (self.q[q] - self.q[p])
            self.energy[chosen] += change
            lowest = int(self.energy.argmin())
            if self.energy[lowest] < self.best_energy - 1e-12:
                self.best, self.best_energy = self.x[lowest].copy(), float(self.energy[lowest])
        return moved

    def _partner(self, i: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return for each chain a weight with the opposite decision, uniformly; `i` itself where there is none."""
        members = np.arange(self.n) if self.members is None else self.members[i]
        opposite = self.x[:, members] != self.x[:, [i]]
        count = opposite.sum(1)
        rank = np.minimum((draws * count).astype(np.int64), np.maximum(count - 1, 0))
        place = (opposite.cumsum(1) > rank[:, None]).argmax(1)
        return np.where(count > 0, members[place], i)


def _polished(problem: Problem, x: Tensor, q: Tensor, groups: Tensor | None) -> Solution:
    """Apply the best swap until none lowers the energy."""
    x = x.clone()
    diagonal = q.diagonal()
    forbidden = None if groups is None else groups.unsqueeze(1) != groups
    floor = 1e-12 * float(q.abs().max()) if q.numel() else 0.0
    for _ in range(4 * len(x)):
        field = 2 * (q @ x.to(q.dtype))
        out = torch.where(x, diagonal - field, torch.inf)  # p leaves the pruned set
        into = torch.where(x, torch.inf, diagonal + field)
        change = out.unsqueeze(1) + into - 2 * q
        if forbidden is not None:
            change = change.masked_fill(forbidden, torch.inf)
        best = int(change.argmin())
        p, other = divmod(best, len(x))
        if float(change[p, other]) >= -floor:
            break
        x[p], x[other] = False, True
    return _solution(problem, x, groups)


def descend(
    problem: Problem, restarts: int, generator: torch.Generator, groups: Tensor | None = None, most: int | None = None
) -> Solution:
    """Lower the energy by many swaps at a time without building a matrix.

    Args:
        problem: The block.
        restarts: Tries; all but the first leave a random half of the weights alone in each round.
        generator: Draws what is left alone.
        groups: int64 `[n]`: swaps stay within a group; None for swaps of any two.
        most: Swaps at most; None for no limit.
    """
    best = _unchanged(problem)
    for attempt in range(max(restarts, 1)):
        found = _Descent(problem, groups, most).run(generator if attempt else None)
        if found.energy < best.energy:
            best = found
    return best


class _Descent:
    """One try of `descend`: what every flip would cost, kept up to date through the samples' expected changes."""

    def __init__(self, problem: Problem, groups: Tensor | None, most: int | None) -> None:
        self.problem, self.groups = problem, groups
        self.n_samples = len(problem.grads)
        self.x = problem.pruned.clone()
        self.change = torch.zeros_like(problem.grads[:, 0])  # [S], what each sample's loss is expected to change by
        self.moved = torch.zeros_like(problem.w0)  # delta
        self.norms = problem.grads.square().sum(0)
        self.energy = 0.0
        self.left = len(problem.w0) if most is None else most

    def run(self, generator: torch.Generator | None) -> Solution:
        """Take rounds of swaps until none lowers the energy."""
        for _ in range(_ROUNDS):
            if self.left <= 0 or not self._round(generator):
                break
        return _solution(self.problem, self.x, self.groups)

    def _flips(self) -> Tensor:
        return torch.where(self.x, self.problem.w0, -self.problem.w0)

    def _costs(self, flips: Tensor) -> Tensor:
        """Return what flipping each weight alone would cost, `[n]`."""
        slope = self.problem.linear + self.change @ self.problem.grads / self.n_samples
        ridge = self.problem.ridge * ((self.moved + flips).square() - self.moved.square())
        return flips * slope + flips.square() * self.norms / (2 * self.n_samples) + ridge

    def _round(self, generator: torch.Generator | None) -> bool:
        """Match, sort, and take the best prefix; return whether there was one."""
        flips = self._flips()
        costs = self._costs(flips)
        if generator is not None:
            drop = torch.rand(len(costs), generator=generator).to(costs.device) < 0.5
            costs = costs.masked_fill(drop, torch.inf)
        restore, prune = self._pairs(costs, flips)
        if not len(restore):
            return False
        # Effect of the first 1, 2, ... pairs on every sample: exact, however many are taken.
        steps = flips[restore] * self.problem.grads[:, restore] + flips[prune] * self.problem.grads[:, prune]
        along = self.change.unsqueeze(1) + steps.cumsum(1)  # [S, pairs]
        ridge = self.problem.ridge
        linear = flips[restore] * self.problem.linear[restore] + flips[prune] * self.problem.linear[prune]
        before = self.moved[restore].square() + self.moved[prune].square()
        after = (self.moved[restore] + flips[restore]).square() + (self.moved[prune] + flips[prune]).square()
        energies = (linear + ridge * (after - before)).cumsum(0)
        energies = energies + (along.square().sum(0) - self.change.square().sum()) / (2 * self.n_samples)
        last = int(energies.argmin())
        if float(energies[last]) >= -1e-12 * (1 + abs(self.energy)):
            return False
        restore, prune = restore[: last + 1], prune[: last + 1]
        self.x[restore], self.x[prune] = False, True
        self.moved[restore] += flips[restore]
        self.moved[prune] += flips[prune]
        self.change = along[:, last].clone()
        self.energy += float(energies[last])
        self.left -= last + 1
        return True

    def _pairs(self, costs: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights to restore and to prune whose swap seems to pay, best first."""
        if self.groups is None:
            inside = torch.where(self.x, costs, torch.inf)
            outside = torch.where(self.x, torch.inf, costs)
            count = min(int(self.x.sum()), int((~self.x).sum()), self.left)
            restore = inside.argsort(stable=True)[:count]
            prune = outside.argsort(stable=True)[:count]
            pays = inside[restore] + outside[prune] < 0
            if not bool(pays.any()) and count:  # the best pair, couplings included, may pay all the same
                restore, prune = restore[:_FEW], prune[:_FEW]
                return self._coupled(inside[restore], outside[prune], flips, restore, prune)
            return restore[pays], prune[pays]
        gain, price = torch.where(self.x, costs, torch.inf), torch.where(self.x, torch.inf, costs)
        inside, outside = _lowest(gain, self.groups), _lowest(price, self.groups)
        total = gain[inside] + price[outside]
        total = total + (
            flips[inside] * flips[outside] * (self.problem.grads[:, inside] * self.problem.grads[:, outside]).sum(0)
        ) / (self.n_samples)
        order = total.argsort(stable=True)
        order = order[total[order] < 0][: self.left]
        return inside[order], outside[order]

    def _coupled(
        self, gain: Tensor, price: Tensor, flips: Tensor, restore: Tensor, prune: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the best single pair among candidates of both sides, with the coupling of its two weights."""
        a = flips[restore] * self.problem.grads[:, restore]
        b = flips[prune] * self.problem.grads[:, prune]
        total = gain.unsqueeze(1) + price + a.T @ b / self.n_samples
        best = int(total.argmin())
        p, q = divmod(best, len(prune))
        if float(total[p, q]) >= 0:
            return restore[:0], prune[:0]
        return restore[p : p + 1], prune[q : q + 1]


_FEW = 256
"""Candidates of each side among which couplings are looked at when no pair pays without them."""


def _lowest(costs: Tensor, groups: Tensor) -> Tensor:
    """Return the index of the lowest cost in each group, `[groups]`; groups are numbered from 0 without gaps."""
    order = costs.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    first = torch.full((int(groups.max()) + 1,), len(order), dtype=torch.long, device=costs.device)
    return order[first.scatter_reduce_(0, groups, rank, "amin")]


def _unchanged(problem: Problem) -> Solution:
    return Solution(problem.pruned.clone(), 0.0, torch.empty(0, 2, dtype=torch.long, device=problem.pruned.device))


def _solution(problem: Problem, x: Tensor, groups: Tensor | None = None) -> Solution:
    """Describe a decision, with its swaps in the order of what their weights cost alone."""
    energy = float(problem.energy(x))
    if energy >= 0:
        return _unchanged(problem)
    flips = problem.flips()
    costs = flips * problem.linear + flips.square() * problem.grads.square().sum(0) / (2 * len(problem.grads))
    changed = x != problem.pruned
    restored, pruned = (changed & problem.pruned).nonzero()[:, 0], (changed & ~problem.pruned).nonzero()[:, 0]
    restored, pruned = restored[costs[restored].argsort(stable=True)], pruned[costs[pruned].argsort(stable=True)]
    if groups is not None:  # pairs lie within groups
        restored = restored[groups[restored].argsort(stable=True)]
        pruned = pruned[groups[pruned].argsort(stable=True)]
        by_cost = (costs[restored] + costs[pruned]).argsort(stable=True)
        restored, pruned = restored[by_cost], pruned[by_cost]
    return Solution(x.clone(), energy, torch.stack([restored, pruned], 1))
