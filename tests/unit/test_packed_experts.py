"""Packed experts compute what explicit arithmetic does; layouts they do not know are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from compressor.checkpoint.skeleton import Target
from compressor.engine.experts import Stack, run_experts
from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import QuantFormat
from compressor.runtime import PackedExperts, PackedLinear
from compressor.stacks import StackLayout, places


def make_format(name: str, dtype: torch.dtype = torch.float32) -> QuantFormat:
    return get_format(name, 64, dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class FakeExperts(nn.Module):
    """Three experts of width 16 on 32 inputs; the classes below differ in the flags of their decorators."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(67)
        self.up_proj = nn.Parameter(torch.randn(3, 16, 32, generator=generator))
        self.gate_up_proj = nn.Parameter(torch.randn(3, 32, 32, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 32, 16, generator=generator))
        self.act_fn = Activation()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


def fake(**flags: bool) -> nn.Module:
    decorated = use_experts_implementation(type("Fake", (FakeExperts,), {}), **flags)
    return decorated(None)


def packed_experts(source: nn.Module, gated: bool) -> tuple[PackedExperts, list[dict[str, Tensor]]]:
    fmt = make_format("mxfp4")
    generator = torch.Generator().manual_seed(71)
    experts, dense = [], []
    for _ in range(3):
        layers, weights = {}, {}
        for role in ("gate", "up", "down")[0 if gated else 1 :]:
            weight = torch.randn((64, 32) if role != "down" else (32, 64), generator=generator)
            qparams = fmt.fit(weight)
            codes = fmt.encode(weight, qparams)
            layers[f"{role}_proj"] = PackedLinear(fmt.pack(codes, qparams), fmt)
            weights[role] = fmt.decode(codes, qparams)
        experts.append(layers)
        dense.append(weights)
    roles = {role: f"{role}_proj" for role in dense[0]}
    return PackedExperts(source, experts, roles), dense


@pytest.mark.parametrize("gated", [True, False])
def test_packed_experts_equal_explicit_arithmetic(gated: bool) -> None:
    module, dense = packed_experts(fake(has_gate=gated), gated)
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(9, 32, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])  # 3 is no expert: skipped
    assert (index == 3).any()
    share = torch.rand(9, 2, generator=generator)
    expected = torch.zeros(9, 32, dtype=torch.float64)
    for token in range(9):
        for slot in range(2):
            expert = int(index[token, slot])
            if expert < 3:
                weights = {role: value.double() for role, value in dense[expert].items()}
                hidden = weights["up"] @ x[token].double()
                hidden = torch.tanh(weights["gate"] @ x[token].double()) * hidden if gated else torch.tanh(hidden)
                expected[token] += share[token, slot].double() * (weights["down"] @ hidden)
    assert relative(module(x, index, share), expected) < 1e-5
    assert not list(module.source.parameters())  # the dense stacks are gone
    assert "2.down_proj.weight_packed" in module.state_dict()


def test_expert_layouts_that_are_not_computed_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Fake: .*norm behind them"):
        packed_experts(fake(has_post_expert_norm=True), True)


@pytest.mark.parametrize(
    "flags",
    [
        {"is_transposed": True},
        {"is_concatenated": False},
        {"has_bias": True},
        {"has_bias": True, "has_gate": False},
        {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    ],
    ids=str,
)
def test_every_other_layout_gives_what_its_own_module_computes(flags: dict[str, bool]) -> None:
    """Packed experts, and those run beside rounded inputs, against the loop of transformers over the same stacks."""
    layout = StackLayout(
        flags.get("is_transposed", False),
        not flags.get("is_concatenated", True),
        flags.get("has_bias", False),
        flags.get("has_gate", True),
    )
    source: Any = fake(**flags)
    generator = torch.Generator().manual_seed(79)
    fmt = make_format("mxfp4")
    shapes = {"gate_up_proj": (3, 128, 32), "up_proj": (3, 64, 32), "down_proj": (3, 32, 64)}
    for leaf, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        source.register_parameter(leaf, nn.Parameter(value.mT.contiguous() if layout.transposed else value))
        if layout.biased:
            source.register_parameter(f"{leaf}_bias", nn.Parameter(torch.randn(shape[:2], generator=generator)))
    if not layout.gated:
        del source.gate_up_proj
    if layout.interleaved:
        source._apply_gate = lambda both: torch.tanh(both[..., ::2]) * both[..., 1::2]
    experts: list[dict[str, PackedLinear]] = [{} for _ in range(3)]
    stack: Stack = {}
    for expert, role, leaf, where in places(source):
        part = where.of(source.get_parameter(leaf).data)
        weight = part.contiguous()
        q = fmt.fit(weight)
        packed = fmt.pack(fmt.encode(weight, q), q)
        part.copy_(fmt.decode(*fmt.unpack(packed)))
        experts[expert][f"{role}_proj"] = PackedLinear(packed, fmt)
        stack.setdefault(expert, {})[role] = Target(f"x.{leaf}", where)
    x = torch.randn(11, 32, generator=generator)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(11)])
    share = torch.rand(11, 2, generator=generator)
    with torch.no_grad():
        expected = batched_mm_experts_forward(source, x, index, share)
        assert relative(run_experts(source, stack, {}, x, index, share), expected) < 1e-5
        module = PackedExperts(source, experts, {role: f"{role}_proj" for role in layout.roles})
        assert relative(module(x, index, share), expected) < 1e-5
    assert ("down_proj_bias" in module.state_dict()) == layout.biased


def test_experts_that_do_not_describe_themselves_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"FakeExperts: .*has_gate"):
        packed_experts(FakeExperts(None), True)
