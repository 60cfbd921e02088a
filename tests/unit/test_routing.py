"""Router health: agreement, divergence and load of two mixtures of experts, against arithmetic written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.evals.compare import compare
from compressor.evals.perplexity import Text
from compressor.evals.routing import routed_stacks
from compressor.evals.tasks import choose
from compressor.testing import models

TOKENS, CONTEXT = 40, 16


def text() -> Text:
    return Text("text", models.sample_tokens(models.tiny_olmoe(), length=TOKENS)[0], CONTEXT)


def choices(model: torch.nn.Module, window: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the logits of every router and the experts it chose, by the name of its stack."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        router.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (out[0], out[2])))
        for name, (_, router) in routed_stacks(model).items()
    ]
    with torch.no_grad():
        model(window[None])
    for handle in handles:
        handle.remove()
    return seen


def test_numbers_are_those_of_the_routers_own_outputs() -> None:
    ours, theirs = models.tiny_olmoe(), models.tiny_olmoe()
    with torch.no_grad():
        for name, param in ours.named_parameters():
            if name.endswith("mlp.gate.weight"):
                param += 0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
    found = compare(ours, theirs, text()).routers
    assert found is not None
    agreement, divergence, positions = 0.0, 0.0, 0
    load: dict[str, Tensor] = {}
    for window in text().tokens.split(CONTEXT):
        here, there = choices(ours, window), choices(theirs, window)
        for name in here:
            load[name] = load.get(name, torch.zeros(4)) + here[name][1].flatten().bincount(minlength=4)
            for (mine, chosen), (its, wanted) in [(here[name], there[name])]:
                for t in range(len(window) - 1):
                    agreement += len(set(chosen[t].tolist()) & set(wanted[t].tolist())) / 2 / len(here)
                    p, q = its[t].double().softmax(-1), mine[t].double().softmax(-1)
                    divergence += float((p * (p / q).log()).sum()) / len(here)
        positions += len(window) - 1
    assert found.metrics["router_agreement"].value == pytest.approx(agreement / positions)
    assert 0 < agreement / positions < 1
    assert found.metrics["router_kl"].value == pytest.approx(divergence / positions, rel=1e-4)
    variation = sum(float(n.std(correction=0) / n.mean()) for n in load.values()) / len(load)
    assert found.metrics["load_variation"].value == pytest.approx(variation)
    assert found.metrics["unused_experts"].value == sum(int((n == 0).sum()) for n in load.values())
    assert found.metrics["load_variation_original"].value != pytest.approx(variation)


def test_the_same_model_agrees_with_itself() -> None:
    model = models.tiny_deepseek()
    found = compare(model, model, text()).routers
    assert found is not None
    assert found.metrics["router_agreement"].value == 1
    assert found.metrics["router_kl"].value == 0
    assert found.metrics["load_variation"] == found.metrics["load_variation_original"]


def test_models_without_experts_have_no_such_result() -> None:
    model = models.tiny_llama()
    assert compare(model, model, text()).routers is None
    with pytest.raises(RecipeError, match="one model has experts in 2 layers, the other in 0"):
        compare(models.tiny_olmoe(), model, text())


def test_the_task_is_chosen_where_it_says_something() -> None:
    def names(**known: bool) -> list[str]:
        return [spec.name for spec in choose(None, None, **known)]  # type: ignore[arg-type]

    assert names(has_baseline=True, has_experts=True) == ["perplexity", "kl", "routers"]
    assert names(has_baseline=True) == ["perplexity", "kl"]
    assert names(has_baseline=False, has_experts=True) == ["perplexity"]
    with pytest.raises(RecipeError, match="no experts"):
        choose(["routers"], None, has_baseline=True)
    with pytest.raises(RecipeError, match="routers compares with a baseline"):
        choose(["routers"], None, has_baseline=False, has_experts=True)
