"""The quadratic model of one block of weights at the current, already pruned model.

iCBS, arXiv 2411.17796. A decision `x` in {0, 1}^n prunes (1) or keeps (0) each weight of the block; kept weights have
their original value `w0`. With `delta = w0 (1 - x) - w` the change against the current values `w`,

    E(x) = l . delta + |Gs delta|^2 / (2 S) + ridge |delta|^2

where `Gs` `[S, n]` holds the gradients of single samples (so that `Gs^T Gs / S` is the empirical Fisher matrix) and
`l = alpha g` with the mean gradient `g`. `E` of the current mask is 0, so the best energy is never positive. Couplings
have both signs; the negative ones, of weights whose removals cancel, are what the method is about.

Our extension: samples may already expect a change `r0` `[S]` of their loss from blocks decided before, at the same
expansion point. The energy of both together is `E` with `l + Gs^T r0 / S`, so blocks of many layers share one model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One block.

    Attributes:
        w0: `[n]` original values.
        pruned: bool `[n]`, the current mask: True where the weight is zero now.
        linear: `[n]` the factor of `delta` in the energy.
        grads: `[S, n]` gradients of single samples.
        ridge: What a squared change costs.
    """

    w0: Tensor
    pruned: Tensor
    linear: Tensor
    grads: Tensor
    ridge: float

    @classmethod
    def of(
        cls, w0: Tensor, pruned: Tensor, grads: Tensor, alpha: float, ridge: float, expected: Tensor | None = None
    ) -> Problem:
        """Build the problem of one block.

        Args:
            w0: `[n]` original values.
            pruned: bool `[n]`, the current mask.
            grads: `[S, n]` gradients of single samples at the current weights.
            alpha: Factor of the mean gradient.
            ridge: What a squared change costs.
            expected: `[S]` change of every sample's loss that blocks decided before bring; None for none.
        """
        linear = alpha * grads.mean(0)
        if expected is not None:
            linear = linear + expected @ grads / len(grads)
        return cls(w0, pruned, linear, grads, ridge)

    def delta(self, x: Tensor) -> Tensor:
        """Return the change against the current weights, `[..., n]`, of decisions `x` bool `[..., n]`."""
        return self.w0 * (self.pruned.to(self.w0.dtype) - x.to(self.w0.dtype))

    def energy(self, x: Tensor) -> Tensor:
        """Return the energy of decisions `[..., n]`, from the definition: no `n x n` matrix is built."""
        delta = self.delta(x)
        curvature = (delta @ self.grads.T).square().sum(-1) / (2 * len(self.grads))
        return delta @ self.linear + curvature + self.ridge * delta.square().sum(-1)

    def predicted(self, x: Tensor) -> float:
        """Return the change of the loss the model expects: the energy without its ridge."""
        return float(self.energy(x) - self.ridge * self.delta(x).square().sum(-1))

    def flips(self) -> Tensor:
        """Return `[n]` the change each weight undergoes when its decision flips: `w0` if restored, `-w0` if pruned."""
        return torch.where(self.pruned, self.w0, -self.w0)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Return `Q` `[n, n]` and `c` with `E(x) = x^T Q x + c`; for small blocks and tests."""
        n_samples = len(self.grads)
        hessian = self.grads.T @ self.grads / n_samples
        d = -self.w0 * self.pruned.to(self.w0.dtype)
        diagonal = self.w0 * (hessian @ d) - self.w0 * self.linear + self.ridge * (2 * d + self.w0) * self.w0
        q = torch.outer(self.w0, self.w0) * hessian / 2 + torch.diag(diagonal)
        c = d @ hessian @ d / 2 - self.linear @ d + self.ridge * (d @ d)
        return q, c
