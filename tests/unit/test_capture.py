"""Statistics collected while a block runs, against explicit computations of what each layer reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer

from compressor.calibration.capture import Capture, expert_middle
from compressor.calibration.stats import SecondMoment
from compressor.checkpoint.blocks import BlockSequence
from compressor.errors import UnsupportedError
from compressor.testing.models import sample_tokens, tiny_gpt_oss, tiny_olmoe

CPU = torch.device("cpu")
FULL = SecondMoment()
EXPERTS = 4


@pytest.fixture(scope="module")
def sequence() -> BlockSequence:
    model = tiny_olmoe()
    blocks = BlockSequence.find(model)
    blocks.trace()
    return blocks


def ids(experts: Iterator[int] | range, ends: tuple[str, ...] = ("in", "mid")) -> list[str]:
    return [f"model.layers.0.mlp.experts#{expert}.{end}" for expert in experts for end in ends]


def captured(
    sequence: BlockSequence, names: list[str], specs: tuple[SecondMoment, ...] = (FULL,), length: int = 40
) -> Capture:
    """Run two samples through block 0 with statistics attached."""
    modules = {name: sequence.model.get_submodule(name.partition("#")[0]) for name in names}
    capture = Capture(dict.fromkeys(names, 64), modules, specs, CPU)
    for seed in (0, 1):
        hidden, recording = sequence.prologue({"input_ids": sample_tokens(sequence.model, length, seed)})
        with capture.attached(), torch.no_grad():
            sequence.run(0, hidden, recording)
        capture.close_lane()
    return capture


def read_by(sequence: BlockSequence, name: str) -> Tensor:
    """Return the rows module `name` reads in both samples, in float64, through a hook of our own."""
    rows: list[Tensor] = []
    module = sequence.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2).double()))
    for seed in (0, 1):
        hidden, recording = sequence.prologue({"input_ids": sample_tokens(sequence.model, seed=seed)})
        with torch.no_grad():
            sequence.run(0, hidden, recording)
    handle.remove()
    return torch.cat(rows)


def test_dense_layers_see_every_token(sequence: BlockSequence) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    capture = captured(sequence, names, (FULL, SecondMoment(16)))
    for name in names:
        x = read_by(sequence, name)
        for spec in (FULL, SecondMoment(16)):
            assert capture.sums[name][spec].n_tokens == 80
        torch.testing.assert_close(capture.sums[name][FULL].value().double(), x.T @ x, rtol=1e-5, atol=1e-4)


def test_experts_see_the_tokens_routed_to_them(sequence: BlockSequence) -> None:
    """Token by token in plain Python: which experts a token goes to, and what their down projection reads."""
    capture = captured(sequence, ids(range(EXPERTS)))
    block = sequence.block(0)
    assert isinstance(block, OlmoeDecoderLayer)
    inputs = read_by(sequence, "model.layers.0.mlp")
    gate, stacked = block.mlp.gate.weight.double(), block.mlp.experts.gate_up_proj.double()
    entering = {expert: torch.zeros(64, 64, dtype=torch.float64) for expert in range(EXPERTS)}
    middle = {expert: torch.zeros(64, 64, dtype=torch.float64) for expert in range(EXPERTS)}
    count = dict.fromkeys(range(EXPERTS), 0)
    for x in inputs:
        for expert in (gate @ x).topk(2).indices.tolist():
            up = stacked[expert] @ x
            h = nn.functional.silu(up[:64]) * up[64:]
            entering[expert] += torch.outer(x, x)
            middle[expert] += torch.outer(h, h)
            count[expert] += 1
    assert sum(count.values()) == 2 * len(inputs) == 160
    for expert in range(EXPERTS):
        first, second = (capture.sums[name][FULL] for name in ids(range(expert, expert + 1)))
        assert first.n_tokens == second.n_tokens == count[expert]
        torch.testing.assert_close(first.value().double(), entering[expert], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.value().double(), middle[expert], rtol=1e-4, atol=1e-4)


def test_down_projections_read_what_was_captured(sequence: BlockSequence) -> None:
    """The expert stack's own output, without routing weights, follows from `expert_middle`."""
    stack = sequence.model.get_submodule("model.layers.0.mlp.experts")
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(EXPERTS):
        with torch.no_grad():
            out = stack(rows, torch.full((9, 1), expert), torch.ones(9, 1))
        down = stack.get_parameter("down_proj")[expert]
        torch.testing.assert_close(expert_middle(stack, expert, rows) @ down.T, out, rtol=1e-4, atol=1e-5)


def test_an_expert_no_token_reaches_has_none(sequence: BlockSequence) -> None:
    """Two samples of one token each, two experts per token: at most four visits, and the sums show just those."""
    capture = captured(sequence, ids(range(EXPERTS)), length=1)
    counts = [capture.sums[name][FULL].n_tokens for name in ids(range(EXPERTS), ("in",))]
    assert sum(counts) == 4
    assert 0 in counts, "choose other tokens: every expert was reached"
    for expert, count in enumerate(counts):
        for name in ids(range(expert, expert + 1)):
            assert capture.sums[name][FULL].n_tokens == count
            assert bool(capture.sums[name][FULL].value().any()) == (count > 0)


@pytest.mark.parametrize("ends", [("in",), ("mid",)])
def test_only_what_was_asked_for_is_collected(sequence: BlockSequence, ends: tuple[str, ...]) -> None:
    """The down projections may be skipped, or the others."""
    names = ids(range(1, 3), ends)
    capture = captured(sequence, names)
    both = captured(sequence, ids(range(EXPERTS)))
    assert list(capture.sums) == names
    for name in names:
        assert torch.equal(capture.sums[name][FULL].value(), both.sums[name][FULL].value())


def test_nothing_stays_attached(sequence: BlockSequence) -> None:
    capture = captured(sequence, [*ids(range(EXPERTS)), "model.layers.0.self_attn.q_proj"])
    assert not any(module._forward_pre_hooks for module in sequence.model.modules())
    before = capture.sums["model.layers.0.self_attn.q_proj"][FULL].n_tokens
    with pytest.raises(ZeroDivisionError), capture.attached():
        raise ZeroDivisionError
    read_by(sequence, "model.layers.0.mlp")
    assert capture.sums["model.layers.0.self_attn.q_proj"][FULL].n_tokens == before
    assert not any(module._forward_pre_hooks for module in sequence.model.modules())


def test_layouts_other_than_the_usual_one() -> None:
    """GPT-OSS keeps matrices transposed, lets gate and up alternate, and adds biases."""
    stack = tiny_gpt_oss().get_submodule("model.layers.0.mlp.experts")
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(5))
    for expert in range(EXPERTS):
        chosen = torch.full((7, 1), expert)
        out = stack(rows, chosen, torch.ones(7, 1))
        middle = expert_middle(stack, expert, rows)
        ours = middle @ stack.get_parameter("down_proj")[expert] + stack.get_parameter("down_proj_bias")[expert]
        torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)


def test_unknown_expert_layouts_are_refused(sequence: BlockSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = sequence.model.get_submodule("model.layers.0.mlp.experts")
    monkeypatch.setattr(stack, "has_post_expert_norm", True)
    with pytest.raises(UnsupportedError, match="norm behind them") as error:
        expert_middle(stack, 0, torch.zeros(1, 64))
    assert error.value.hint
