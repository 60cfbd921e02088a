"""Collecting statistics of the tensors that layers read, while a block runs.

One accumulator serves all layers that read the same tensor. Experts read only the rows routed to them, so each expert
has its own; what the down projection reads is recomputed from the expert's own weights, as the fused module never
exposes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.stats import Accumulator, Statistic
from compressor.errors import UnsupportedError

Statistics = dict[Statistic, Accumulator]


class Capture:
    """Accumulators for one block.

    Args:
        widths: fed_by id -> number of input features. Ids of experts are `MODULE#EXPERT.in` and `MODULE#EXPERT.mid`.
        modules: fed_by id -> module whose first argument is the tensor (for experts: the expert stack).
        specs: What to collect for each id.
        device: Where sums live.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        modules: Mapping[str, nn.Module],
        specs: tuple[Statistic, ...],
        device: torch.device,
    ) -> None:
        self._modules = modules
        self.sums: dict[str, Statistics] = {
            name: {spec: spec.start(width, device) for spec in specs} for name, width in widths.items()
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Collect from every forward pass inside the `with`."""
        handles = []
        stacks: dict[int, tuple[nn.Module, list[str]]] = {}
        for name, module in self._modules.items():
            if "#" in name:
                stacks.setdefault(id(module), (module, []))[1].append(name)
            else:
                handles.append(module.register_forward_pre_hook(self._dense_hook(name)))
        for module, names in stacks.values():
            handles.append(module.register_forward_pre_hook(self._expert_hook(names)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def close_lane(self) -> None:
        """Close the open lane of every accumulator."""
        for statistics in self.sums.values():
            for total in statistics.values():
                total.close_lane()

    def _update(self, name: str, rows: Tensor) -> None:
        for total in self.sums[name].values():
            total.update(rows)

    def _dense_hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._update(name, args[0].detach().flatten(0, -2))

        return hook

    def _expert_hook(self, names: list[str]) -> Any:
        wanted = sorted({int(name.partition("#")[2].partition(".")[0]) for name in names})
        stack = names[0].partition("#")[0]
        collected = set(names)  # not both of each expert: the format may refuse one width, or the user skip it

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, indices = args[0].detach(), args[1]
            for expert in wanted:
                rows = hidden[(indices == expert).any(-1)]  # [tokens of this expert, hidden]
                if f"{stack}#{expert}.in" in collected:
                    self._update(f"{stack}#{expert}.in", rows)
                if f"{stack}#{expert}.mid" in collected and len(rows):
                    self._update(f"{stack}#{expert}.mid", expert_middle(module, expert, rows))

        return hook


def expert_middle(module: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """Return what expert `expert`'s down projection reads for `rows` `[tokens, hidden]`: `[tokens, intermediate]`.

    Raises:
        UnsupportedError: The stack's layout is not the standard one (gate and up stacked by rows, no bias).
    """
    odd = [
        flag
        for flag, normal in (
            ("is_transposed", False),
            ("is_concatenated", True),
            ("has_bias", False),
            ("has_gate", True),
        )
        if getattr(module, flag, normal) is not normal
    ]
    gate: Any = getattr(module, "_apply_gate", None)
    if odd or gate is None:
        raise UnsupportedError(
            f"{type(module).__name__}: expert layout {odd or 'without _apply_gate'} is not supported yet",
            "use a data-free method such as rtn",
        )
    stacked: Tensor = module.get_parameter("gate_up_proj")
    middle: Tensor = gate(rows @ stacked[expert].T)
    return middle.detach()
