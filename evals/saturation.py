"""How much of what flows into layers lies beyond their static scales while a model is scored.

Static scales were calibrated on other text. What lies beyond them is cut off, so a score may hide that they are too
narrow, or say nothing about text where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compressor.inputs import apply_ops, is_static, saturated
from compressor.runtime import PackedLinear


@dataclass(frozen=True)
class Saturation:
    """What was cut off, over all layers with static scales.

    Attributes:
        share: Share of their inputs' values.
        layers: How many such layers ran.
        worst: The layer with the largest share of its own; None if nothing was cut off.
        worst_share: That share.
    """

    share: float
    layers: int
    worst: str | None
    worst_share: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"share": self.share, "layers": self.layers, "worst": self.worst, "worst_share": self.worst_share}


@dataclass
class Watch:
    """Counts while a model runs; one may watch several in turn, under the same names."""

    _cut: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def over(self, model: nn.Module) -> None:
        """Count in every layer of a model that has a static scale, from now on."""
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear) and any(is_static(op) for op in module.inputs):
                module.register_forward_pre_hook(self._hook(name))

    def result(self) -> Saturation | None:
        """Return what was counted; None if no layer with a static scale has run."""
        total = sum(self._seen.values())
        if not total:
            return None
        shares: Mapping[str, float] = {name: self._cut[name] / seen for name, seen in self._seen.items()}
        worst = max(shares, key=lambda name: shares[name])
        found = worst if shares[worst] > 0 else None
        return Saturation(sum(self._cut.values()) / total, len(shares), found, shares[worst])

    def _hook(self, name: str) -> Any:
        def hook(module: PackedLinear, args: tuple[Tensor, ...]) -> None:
            ops = module.inputs
            x = apply_ops(ops[:-1], args[0])
            if x.numel():
                self._cut[name] = self._cut.get(name, 0) + saturated(ops[-1], x)
                self._seen[name] = self._seen.get(name, 0) + x.numel()

        return hook
