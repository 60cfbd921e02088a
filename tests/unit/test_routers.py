"""How routers choose is found out by running them, and the rule found is what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.calibration.routers import router_logits, routing_rule
from compressor.calibration.routing_rule import SOFTMAX, RoutingRule
from compressor.testing import models

ROUTERS: list[tuple[Callable[[], PreTrainedModel], str, bool, int]] = [
    (models.tiny_mixtral, "model.layers.0.mlp.gate", False, 1),
    (models.tiny_qwen2_moe, "model.layers.1.mlp.gate", False, 1),
    (models.tiny_qwen3_moe, "model.layers.0.mlp.gate", False, 1),
    (models.tiny_olmoe, "model.layers.0.mlp.gate", False, 1),
    (models.tiny_gpt_oss, "model.layers.0.mlp.router", False, 1),
    (models.tiny_deepseek, "model.layers.1.mlp.gate", True, 2),
]


@pytest.mark.parametrize(
    ("build", "name", "sigmoid", "groups"), ROUTERS, ids=lambda part: getattr(part, "__name__", "")
)
def test_the_rule_of_a_router(build: Callable[[], PreTrainedModel], name: str, sigmoid: bool, groups: int) -> None:
    model: Any = build()
    router = model.get_submodule(name)
    if sigmoid:
        router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.4]))
    rule = routing_rule(router, model.get_submodule(name.rpartition(".")[0]))
    assert (rule.sigmoid, rule.groups) == (sigmoid, groups)
    x = torch.randn(200, router.weight.shape[1], generator=torch.Generator().manual_seed(9))
    logits, weights, indices = router(x)
    torch.testing.assert_close(router_logits(router, x), logits)
    assert torch.equal(rule.scores(logits).topk(2).indices.sort(-1).values, indices.sort(-1).values)
    shares = rule.log_shares(logits).exp()
    torch.testing.assert_close(shares.sum(-1), torch.ones(200))
    chosen = shares.gather(-1, indices)
    torch.testing.assert_close(chosen / chosen.sum(-1, True), weights / weights.sum(-1, True))


class Odd(nn.Module):
    """A router that does what the test says."""

    def __init__(self, choose: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)), requires_grad=False)
        self.num_group = 3
        self.topk_group = 2
        self.choose = choose

    def forward(self, x: Tensor, *further: Tensor) -> Any:
        return self.choose(x @ self.weight.T, *further)


def best(scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = scores.topk(2, -1).indices
    return scores, shares.gather(-1, indices), indices


def test_rules_that_are_put_together_otherwise() -> None:
    around = nn.Module()
    around.register_buffer("e_score_correction_bias", torch.tensor([0.0, 0.3, 0, -0.3, 0.1, 0]))
    given = Odd(lambda logits, bias: best(logits.sigmoid() + bias, logits.sigmoid()))  # its bias lies beside it
    assert routing_rule(given, around).sigmoid
    assert routing_rule(given, around).groups == 1
    soft = Odd(
        lambda logits: best(logits.softmax(-1) + around.get_buffer("e_score_correction_bias"), logits.softmax(-1))
    )
    rule = routing_rule(soft, around)
    assert not rule.sigmoid
    assert rule.correction is not None

    def grouped(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # DeepSeek-V2: the best expert stands for its group
        shares = logits.softmax(-1)
        kept = shares.unflatten(-1, (3, 2)).amax(-1).topk(2, -1).indices
        mask = torch.zeros(len(shares), 3).scatter_(1, kept, 1).repeat_interleave(2, 1)
        return best(shares * mask, shares)

    assert routing_rule(Odd(grouped), nn.Module()) == RoutingRule(False, None, 3, 2)


@pytest.mark.parametrize(
    "choose",
    [
        lambda logits: logits,
        lambda logits: best(-logits, logits.softmax(-1)),
        lambda logits: (logits, logits.topk(2).values, logits.topk(3).indices),
        lambda logits, one, two: best(logits, logits),
    ],
    ids=["logits alone", "the worst", "shapes", "arguments"],
)
def test_what_no_rule_explains_is_taken_for_softmax(choose: Callable[..., Any]) -> None:
    assert routing_rule(Odd(choose), nn.Module()) is SOFTMAX
    assert routing_rule(Odd(choose).to("meta"), nn.Module()) is SOFTMAX
