"""Experts in one launch: routing, stacks, the operator, and how packed experts use them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.integrations.moe import use_experts_implementation

from compressor.errors import UnsupportedError
from compressor.kernels import dispatch
from compressor.kernels.dispatch import Kernel
from compressor.kernels.gpu import experts, kernel
from compressor.kernels.gpu.kernel import ExpertStack, TritonWeight
from compressor.kernels.gpu.layout import RuntimeWeight
from compressor.kernels.gpu.prepare import decode, prepare
from compressor.runtime import PackedExperts, PackedLinear
from compressor.stacks import BIASES
from compressor.testing.kernels import KernelCase, build_weight


class FakeExperts(nn.Module):
    """Three experts of width 32 on 32 inputs, with biases."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        shapes = {"up_proj": (3, 32, 32), "gate_up_proj": (3, 64, 32), "down_proj": (3, 32, 32)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator(31))))
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(shape[:2], generator=generator(32)).bfloat16()))
        self.act_fn = nn.Tanh()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


def packed_moe_layer(name: str, group: int | None, **flags: bool) -> PackedExperts:
    source = use_experts_implementation(type("Fake", (FakeExperts,), {}), **flags)(None)
    if not flags.get("has_bias"):
        for leaf in BIASES:
            delattr(source, leaf)
    roles = ("gate", "up", "down") if flags.get("has_gate", True) else ("up", "down")
    layers = []
    for expert in range(3):
        case = KernelCase(name, group, 0, 32, 32, "bfloat16")
        built = {role: build_weight(case, generator(10 * expert + i)) for i, role in enumerate(roles)}
        layers.append({f"{r}_proj": PackedLinear(p, fmt, dtype=torch.bfloat16) for r, (p, fmt, _) in built.items()})
    return PackedExperts(source, layers, {role: f"{role}_proj" for role in roles})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack_of(name: str, group: int | None, count: int, n: int = 24, k: int = 64) -> RuntimeWeight:
    case = KernelCase(name, group, 0, n, k, "bfloat16")
    stacked = experts.stack([prepare(*build_weight(case, generator(i))[:2]) for i in range(count)])
    assert stacked is not None
    return stacked


@pytest.mark.parametrize(
    ("rows", "n_experts", "block_m"), [(1, 1, 16), (40, 3, 16), (7, 50, 16), (300, 4, 32), (0, 3, 16)]
)
def test_every_row_is_in_one_block_of_its_expert(rows: int, n_experts: int, block_m: int) -> None:
    chosen = torch.randint(0, n_experts + 1, (rows,), generator=generator(rows))
    routing = experts.route(chosen, n_experts, block_m)
    assert sorted(routing.order.tolist()) == list(range(rows))
    found: dict[int, int] = {}
    seen_none = False
    for expert, first, end in routing.blocks.tolist():
        assert not (seen_none and expert >= 0)  # blocks that are not needed are the last ones
        seen_none |= expert < 0
        if expert >= 0:
            places = range(first, min(first + block_m, end))
            assert len(places) > 0
            for row in routing.order[places.start : places.stop].tolist():
                assert row not in found
                found[row] = expert
    assert found == {row: expert for row, expert in enumerate(chosen.tolist()) if expert < n_experts}


def test_rows_per_block_follow_how_many_an_expert_gets() -> None:
    assert [experts.block_rows(rows, 8) for rows in (1, 128, 129, 512, 513, 10_000)] == [16, 16, 32, 64, 128, 128]


def test_stacks_share_memory_with_their_members_and_need_equal_layouts() -> None:
    stacked = stack_of("int4", 32, 3)
    assert stacked.words.shape[0] == 3
    view = experts.member(stacked, 2)
    assert view.words.data_ptr() == stacked.words[2].data_ptr()
    alone = prepare(*build_weight(KernelCase("int4", 32, 0, 24, 64, "bfloat16"), generator(2))[:2])
    assert torch.equal(decode(view), decode(alone))
    assert experts.stack([alone, experts.member(stack_of("int4", 16, 1), 0)]) is None
    assert ExpertStack.of([None, None]) is None


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("nvfp4", 16), ("power4", None)])
def test_the_operator_equals_explicit_arithmetic(name: str, group: int | None) -> None:
    stacked = stack_of(name, group, 3)
    x = torch.randn(5, 64, generator=generator(9)).bfloat16()
    chosen = torch.tensor([0, 2, 2, 3, 1, 0, 3, 3, 2, 1])
    routing = experts.route(chosen, 3, 16)
    found = experts.linear(x, stacked, routing, 10)
    for row, expert in enumerate(chosen.tolist()):
        expected = torch.zeros(24)
        if expert < 3:
            expected = decode(experts.member(stacked, expert)).bfloat16().float() @ x[row // 2].float()
        torch.testing.assert_close(found[row].float(), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(UnsupportedError, match="11 rows"):
        experts.linear(x, stacked, routing, 11)


def test_the_operator_passes_opcheck_and_has_a_fake() -> None:
    stacked = stack_of("int4", 32, 2, 8)
    routing = experts.route(torch.tensor([0, 1, 1, 2]), 2, 16)
    kinds = (stacked.grid, *stacked.shape, stacked.group, stacked.scale_kind, stacked.row_kind, 16, 4)
    x = torch.randn(2, 64, generator=generator()).bfloat16()
    torch.library.opcheck(experts.grouped_linear, (x, *stacked.tensors, routing.blocks, routing.order, *kinds))
    with FakeTensorMode() as mode:
        there = [torch.empty_like(mode.from_tensor(tensor), device="cuda") for tensor in stacked.tensors]
        blocks, order = (torch.empty(2, 3, device="cuda").int(), torch.empty(4, device="cuda").int())
        out = experts.grouped_linear(torch.empty(2, 64, device="cuda").half(), *there, blocks, order, *kinds)
        assert (out.shape, out.dtype, out.device.type) == ((4, 8), torch.float16, "cuda")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the Triton kernels' operators serve this machine, too: in plain torch."""
    kernels = (Kernel("triton", lambda problem: None, kernel.run, kernel.prepare), dispatch.KERNELS[-1])
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "flags", [{"has_gate": True}, {"has_gate": False}, {"has_bias": True}, {"is_concatenated": False}]
)
def test_packed_experts_run_in_one_launch_per_projection(
    flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = packed_moe_layer("int4", 32, **flags)
    x = torch.randn(9, 32, generator=generator(3)).bfloat16()
    index = torch.randint(0, 4, (9, 2), generator=generator(4))  # 3 is no expert
    share = torch.rand(9, 2, generator=generator(5)).bfloat16()
    calls: list[int] = []
    plain = experts.linear

    def counted(x: Tensor, stacked: RuntimeWeight, routing: experts.Routing, rows: int) -> Tensor:
        calls.append(rows)
        return plain(x, stacked, routing, rows)

    monkeypatch.setattr(experts, "linear", counted)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = module(x, index, share)
    assert calls == [18] * (2 + flags.get("has_gate", True))
    one_by_one = packed_moe_layer("int4", 32, **flags)
    one_by_one._stacks = {}
    torch.testing.assert_close(found, one_by_one(x, index, share), rtol=2e-2, atol=2e-2)
    layers = [module.projection(expert, "down") for expert in range(3)]
    words = [layer.get_buffer("runtime_words") for layer in layers]
    assert len({tensor.untyped_storage().data_ptr() for tensor in words}) == 1  # no expert has memory of its own
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    module.to("cpu", torch.bfloat16)
    torch.testing.assert_close(module(x, index, share), found)
    assert len(calls) == 2 * (2 + flags.get("has_gate", True))


@pytest.mark.usefixtures("everywhere")
def test_experts_without_tokens_and_float32_go_one_by_one() -> None:
    module = packed_moe_layer("int4", 32)
    assert module(torch.empty(0, 32).bfloat16(), torch.empty(0, 2).long(), torch.empty(0, 2)).shape == (0, 32)
    x, index = torch.randn(2, 32, generator=generator(6)), torch.tensor([[0, 1], [2, 0]])
    assert module(x, index, torch.ones(2, 2)).dtype == torch.float32
    assert isinstance(module, PackedExperts)
    layer = module.projection(0, "up")
    assert isinstance(layer, PackedLinear)
    assert isinstance(layer.prepared, TritonWeight)
