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
from torch.nn import functional

from compressor.calibration.coverage import Coverage, ForcedRouting, Router
from compressor.calibration.exchange import count_rows, join_lanes
from compressor.calibration.stats import Accumulator, Laned, Statistic
from compressor.ranks import ALONE, Ranks
from compressor.stacks import expert_bias, gated_middle, stack_layout

Statistics = dict[Statistic, Accumulator]


class Capture:
    """Accumulators for one block.

    Args:
        widths: fed_by id -> number of input features. Ids of experts are `MODULE#EXPERT.in` and `MODULE#EXPERT.mid`.
        modules: fed_by id -> module whose first argument is the tensor (for experts: the expert stack).
        specs: What to collect for each id.
        device: Where sums live.
        coverage: Counts the tokens of experts, and says how many each is to have.
        routers: Expert stack -> its router; needed where tokens may have to be sent to experts against it.
        ranks: The processes that share the samples.
        keepers: fed_by id -> the process that keeps its totals; ids that are not in it are kept by all.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        modules: Mapping[str, nn.Module],
        specs: tuple[Statistic, ...],
        device: torch.device,
        coverage: Coverage | None = None,
        routers: Mapping[str, Router] | None = None,
        ranks: Ranks = ALONE,
        keepers: Mapping[str, int] | None = None,
    ) -> None:
        self._modules = modules
        self._ranks, self._keepers = ranks, keepers or {}
        self._routers = routers or {}
        self.coverage = coverage or Coverage()
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

    @property
    def divisible(self) -> bool:
        """Whether each process may look at samples of its own; else every process must look at all of them."""
        return all(isinstance(total, Laned) for statistics in self.sums.values() for total in statistics.values())

    def close_lane(self) -> None:
        """Close the open lane of every accumulator; every process has filled it with the same samples."""
        for fed_by, statistics in self.sums.items():
            kept = self._keepers.get(fed_by, self._ranks.rank) == self._ranks.rank
            for total in statistics.values():
                if kept or not isinstance(total, Laned):
                    total.close_lane()
                else:
                    total.empty_lane()

    def join_lanes(self, holders: int) -> None:
        """Close lanes that the first `holders` processes have filled with samples of their own."""
        if self._ranks.size == 1:
            self.close_lane()
            return
        for fed_by, statistics in self.sums.items():
            for total in statistics.values():
                assert isinstance(total, Laned), total
                join_lanes(total, self._ranks, holders, self._keepers.get(fed_by))

    def count_rows(self) -> None:
        """Let every process know what all have seen, once they have gone through their samples."""
        if self._ranks.size == 1:
            return
        totals = [total for statistics in self.sums.values() for total in statistics.values()]
        count_rows([total for total in totals if isinstance(total, Laned)], self._ranks)
        self.coverage.join(self._ranks.gather(self.coverage))

    def forced(self) -> ForcedRouting | None:
        """Return what finds tokens for experts that lack some still, or None if none does or no router is known."""
        lacking = {expert: n for expert, n in self.coverage.lacking().items() if expert[0] in self._routers}
        if not lacking:
            return None
        stacks = {name.partition("#")[0]: module for name, module in self._modules.items() if "#" in name}
        return ForcedRouting(lacking, stacks, self._routers)

    def add_forced(self, found: ForcedRouting) -> None:
        """Take the tokens that `forced` found into account, as a lane of their own."""
        for (stack, expert), rows in found.found().items():
            module = self._modules.get(f"{stack}#{expert}.in") or self._modules[f"{stack}#{expert}.mid"]
            self.coverage.forced[stack, expert] = len(rows)
            self._update_expert(module, stack, expert, rows)
        self.close_lane()

    def _update(self, name: str, rows: Tensor) -> None:
        for total in self.sums[name].values():
            total.update(rows)

    def _dense_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.coverage.from_reserve:
                x = args[0].detach()
                self._update(name, windows(module, x) if isinstance(module, nn.Conv2d) else x.flatten(0, -2))

        return hook

    def _expert_hook(self, names: list[str]) -> Any:
        wanted = sorted({int(name.partition("#")[2].partition(".")[0]) for name in names})
        stack = names[0].partition("#")[0]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, indices = args[0].detach(), args[1]
            self.coverage.top_k[stack] = indices.shape[-1]
            for expert in wanted:
                rows = hidden[(indices == expert).any(-1)]  # [tokens of this expert, hidden]
                self._update_expert(module, stack, expert, rows[: self.coverage.take((stack, expert), len(rows))])

        return hook

    def _update_expert(self, module: nn.Module, stack: str, expert: int, rows: Tensor) -> None:
        """Add rows `[tokens, hidden]` to what is known about an expert's inputs.

        Not both of its inputs need be collected: the format may refuse one width, or the user skip it.
        """
        if self.sums.get(f"{stack}#{expert}.in"):
            self._update(f"{stack}#{expert}.in", rows)
        if self.sums.get(f"{stack}#{expert}.mid") and len(rows):
            self._update(f"{stack}#{expert}.mid", expert_middle(module, expert, rows))


def windows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what a convolution of one group multiplies by its matrix `[out, in * height * width]`.

    Args:
        conv: The convolution.
        x: Its input `[n, in, height, width]`.

    Returns:
        `[n * positions, in * height * width]`, one row for every window, padding included.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    size, dilation, stride = ((int(a), int(b)) for a, b in (conv.kernel_size, conv.dilation, conv.stride))
    return functional.unfold(padded, size, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def expert_middle(module: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """Return what expert `expert`'s down projection reads for `rows` `[tokens, hidden]`: `[tokens, intermediate]`.

    Raises:
        UnsupportedError: The stack does not say how it is stored.
    """
    layout = stack_layout(module)
    leaf = layout.leaf("up")
    weight = module.get_parameter(leaf)[expert]  # [out, in], or turned
    bias = expert_bias(module, leaf, expert)
    both = rows @ (weight if layout.transposed else weight.T)
    return gated_middle(module, both if bias is None else both + bias).detach()
