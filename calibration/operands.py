"""What goes into the two products of attention: its size and some of it, collected while samples pass.

The operands are queries and keys as they are multiplied (behind rotary embeddings), the probabilities behind the
softmax, and values. Each has one range per attention module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.inputs import OPERANDS

SAMPLES = 4
"""Samples of which operands are kept."""

ROWS = 64
"""Rows of queries and probabilities kept of each sample, evenly over its tokens."""


@dataclass
class OperandWatch:
    """Sees the operands of one attention module and lets them pass.

    Attributes:
        largest: Operand -> largest magnitude over everything that passed, a float32 scalar.
        kept: The operands of some samples: queries and probabilities `[heads, rows, any]`, keys and values
            `[heads, tokens, size]`, float32.
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    _passing: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Look at operand `name`, `[batch, heads, tokens, any]`, and return it."""
        seen = x.detach().abs().amax().float()
        self.largest[name] = torch.maximum(seen, self.largest[name]) if name in self.largest else seen
        if len(self.kept) < SAMPLES:
            sample = x.detach()[0].float()
            if name in ("query", "probability"):
                step = -(-sample.shape[1] // ROWS)
                sample = sample[:, ::step]
            self._passing[name] = sample.clone()
            if name == OPERANDS[-1]:
                self.kept.append(self._passing)
                self._passing = {}
        return x
