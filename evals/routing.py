"""Router health: does a compressed mixture of experts still send its tokens to the experts the original chose?

Compared position by position on the same text, mean over the layers that have experts: the share of a token's experts
that both models choose, and the divergence of the routers' distributions over all experts. The load is compared as a
whole: how unevenly tokens are spread, and how many experts none reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.routers import router_logits, routing_rule
from compressor.errors import RecipeError
from compressor.evals.perplexity import Text
from compressor.evals.scores import Estimate, TaskResult
from compressor.runtime import PackedExperts
from compressor.stacks import is_expert_stack

VERSION = "1"


def routed_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return the experts of a model by name, each with its router.

    A router lies beside its stack, holds a weight with a row for every expert, and reads what the experts read.
    """
    out: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            count = module.n_experts
        elif is_expert_stack(module):
            count = module.get_parameter("down_proj").shape[0]
        else:
            continue
        beside = model.get_submodule(name.rpartition(".")[0]).children()
        routers = [child for child in beside if _rows(child) == count]
        if len(routers) == 1:
            out[name] = module, routers[0]
    return out


def _rows(module: nn.Module) -> int | None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight.shape[0] if weight is not None and weight.ndim == 2 else None


class RouterWatch:
    """Notes, window by window, what the routers of two models do.

    Args:
        candidate: The compressed model.
        baseline: The original.

    Raises:
        RecipeError: They do not have the same experts.
    """

    def __init__(self, candidate: nn.Module, baseline: nn.Module) -> None:
        ours, theirs = routed_stacks(candidate), routed_stacks(baseline)
        if ours.keys() != theirs.keys():
            raise RecipeError(
                f"one model has experts in {len(ours)} layers, the other in {len(theirs)}",
                "compare a compressed model with the model it was made from",
            )
        self._sides = (ours, theirs)
        around = {name: baseline.get_submodule(name.rpartition(".")[0]) for name in theirs}
        self._rules = {name: routing_rule(router, around[name]) for name, (_, router) in theirs.items()}
        self._shares: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # logarithms
        self._chosen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._load: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._parts: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._sides[0])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Note every forward pass inside the `with`."""
        handles = []
        for side, stacks in enumerate(self._sides):
            for name, (module, router) in stacks.items():
                handles.append(module.register_forward_pre_hook(self._hook(side, name, router), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, side: int, name: str, router: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, indices = (*args, *kwargs.values())[:2]
            shares = self._rules[name].log_shares(router_logits(router, hidden))
            self._shares[side][name], self._chosen[side][name] = shares.cpu(), indices.cpu()

        return hook

    def window(self) -> None:
        """Compare what both models did with the last window they have run; its last position predicts nothing."""
        agreements, divergences = [], []
        for name in self._sides[0]:
            ours, theirs = self._chosen[0][name], self._chosen[1][name]
            agreements.append((ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean(-1)[:-1])
            p, q = self._shares[1][name], self._shares[0][name]
            divergences.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0)[:-1])
            for side, chosen in enumerate((ours, theirs)):
                counts = chosen.flatten().bincount(minlength=p.shape[-1])
                self._load[side][name] = self._load[side].get(name, torch.zeros_like(counts)) + counts
        self._parts.append((torch.stack(agreements).mean(0), torch.stack(divergences).mean(0)))

    def result(self, text: Text) -> TaskResult:
        """Return the task's result on a text whose windows have all been compared."""
        agreement, divergence = (torch.cat(column) for column in zip(*self._parts, strict=True))
        samples = text.samples({"router_agreement": agreement, "router_kl": divergence})
        metrics = {"router_agreement": samples.mean("router_agreement"), "router_kl": samples.mean("router_kl")}
        for suffix, load in zip(("", "_original"), self._load, strict=True):
            metrics[f"load_variation{suffix}"] = Estimate(_variation(load), None)
            metrics[f"unused_experts{suffix}"] = Estimate(float(sum(int((n == 0).sum()) for n in load.values())), None)
        return TaskResult(VERSION, text.settings(), metrics, samples)


def _variation(load: dict[str, Tensor]) -> float:
    """Return the mean over layers of the standard deviation of tokens per expert, relative to their mean."""
    parts = [counts.double().std(correction=0) / counts.double().mean() for counts in load.values()]
    return float(torch.stack(parts).mean())
