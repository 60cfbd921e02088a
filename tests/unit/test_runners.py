"""Block sequences of four kinds of model: streamed forward equals the model, reverse sweep equals autograd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from compressor.checkpoint.blocks import WHOLE, BlockSequence
from compressor.checkpoint.ends import example_inputs, first_tensor
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import UnsupportedError
from compressor.runners import forward_stream, reverse_sweep
from compressor.testing import models

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "decoder": lambda: models.tiny_llama(kv_heads=2, layers=3),
    "encoder": models.tiny_bert,
    "moe": models.tiny_olmoe,
    "mixtral": models.tiny_mixtral,
    "shared-expert": models.tiny_qwen2_moe,
    "cnn": models.tiny_resnet,
}


def sliding_window_model() -> PreTrainedModel:
    """Alternates local and global attention, so that blocks get different masks and rotary tables."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=320, sliding_window=4, max_position_embeddings=64, initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=[*BUILDERS, "alternating"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = sliding_window_model() if request.param == "alternating" else BUILDERS[request.param]()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def output_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first_tensor(model(**inputs))


def test_streamed_forward_equals_the_model(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    source, skeleton = Source.open(path), Skeleton.build(path)
    blocks = BlockSequence.find(skeleton.model)
    blocks.trace()
    targets = skeleton.targets({name: info.shape for name, info in source.tensors.items()})
    inside: dict[int | None, list[str]] = {}
    for name, target in targets.items():
        assert target.param is not None
        inside.setdefault(blocks.index_of(target.param), []).append(name)
    resident_params: list[int] = []

    @contextmanager
    def resident(index: int) -> Iterator[None]:
        skeleton.load(source.read(inside[index]))
        held = [n for n, p in skeleton.model.named_parameters() if not p.is_meta and blocks.index_of(n) is not None]
        resident_params.append(len({blocks.index_of(n) for n in held}))
        yield
        skeleton.free({targets[name].param or "" for name in inside[index]})

    inputs = example_inputs(skeleton.model, torch.device("cpu"), length=12)
    skeleton.load(source.read(inside[None]))
    hidden, recording = blocks.prologue(inputs)
    *_, (_, states) = forward_stream(blocks, [hidden], recording, resident)
    with torch.no_grad():
        streamed = blocks.tail(states[0], inputs)
    assert torch.equal(streamed, output_of(model, inputs))
    assert resident_params == [1] * len(blocks.names)  # never two blocks at once


def test_whole_model_is_a_sequence_of_one() -> None:
    model = models.tiny_resnet()
    blocks = BlockSequence.whole(model)
    inputs = example_inputs(model, torch.device("cpu"))
    hidden, recording = blocks.prologue(inputs)
    steps = list(forward_stream(blocks, [hidden], recording, lambda index: nullcontext()))
    assert [index for index, _ in steps] == [0]
    assert blocks.names == (WHOLE,)
    assert torch.equal(blocks.tail(steps[0][1][0], inputs), output_of(model, inputs))


@pytest.mark.parametrize("name", [*BUILDERS, "whole-cnn"])
def test_reverse_sweep_equals_autograd(name: str) -> None:
    model = models.tiny_resnet() if name == "whole-cnn" else BUILDERS[name]()
    model.requires_grad_(True)
    inputs = example_inputs(model, torch.device("cpu"), length=12)
    weights = torch.randn(output_of(model, inputs).shape, generator=torch.Generator().manual_seed(1))

    def loss(output: Tensor) -> Tensor:
        return (output * weights).square().mean()

    loss(first_tensor(model(**inputs))).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    blocks = BlockSequence.whole(model) if name == "whole-cnn" else BlockSequence.find(model)
    hidden, recording = blocks.prologue(inputs)
    boundaries = [hidden]
    with torch.no_grad():
        for index in range(len(blocks.names)):
            boundaries.append(blocks.run(index, boundaries[-1], recording))
    visited = []
    for index, gradient in reverse_sweep(blocks, boundaries, recording, inputs, loss, lambda i: nullcontext()):
        visited.append(index)
        assert gradient.shape == boundaries[index].shape
    assert visited == list(reversed(range(len(blocks.names))))
    for key, parameter in model.named_parameters():
        if blocks.index_of(key) is None or key not in expected:
            continue
        assert parameter.grad is not None, key
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-4, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert any(blocks.index_of(key) is not None for key in expected)


def test_trace_finds_who_reads_the_same_tensor() -> None:
    model = models.tiny_qwen2_moe()
    with torch.device("meta"):
        meta = type(model)(model.config)
    reads = BlockSequence.find(meta).trace().reads
    attention = {reads[f"model.layers.1.self_attn.{name}_proj"] for name in "qkv"}
    assert len(attention) == 1
    moe = [f"model.layers.1.mlp.{name}" for name in ("experts", "gate", "shared_expert.up_proj", "shared_expert_gate")]
    assert len({reads[name] for name in moe}) == 1
    assert reads["model.layers.1.self_attn.o_proj"] not in attention


def test_trace_leaves_the_model_as_it_was() -> None:
    model = models.tiny_olmoe()
    with torch.device("meta"):
        meta = type(model)(model.config)
    BlockSequence.find(meta).trace()
    for name, module in meta.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name


def test_arguments_that_change_with_the_sample_are_refused() -> None:
    model = models.tiny_llama()
    blocks = BlockSequence.find(model)
    _, one = blocks.prologue({"input_ids": torch.arange(6)[None]})
    _, same = blocks.prologue({"input_ids": torch.arange(6, 12)[None]})
    one.check_same(same)
    _, shifted = blocks.prologue({"input_ids": torch.arange(6)[None], "position_ids": torch.arange(1, 7)[None]})
    with pytest.raises(UnsupportedError, match="depend on the sample"):
        one.check_same(shifted)


def test_two_stacks_are_refused() -> None:
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
            self.right = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    with pytest.raises(UnsupportedError, match="both stacks of blocks"):
        BlockSequence.find(Towers())  # type: ignore[arg-type]
