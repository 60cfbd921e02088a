"""Packed experts on the CPU: only those with tokens are touched, and no more than one is ever decoded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from compressor.formats import GroupSize, get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.inputs import InputOp, Quantize, apply_ops
from compressor.kernels import dispatch
from compressor.kernels.cpu import integers, kernel
from compressor.runtime import PackedExperts, PackedLinear
from compressor.testing.grids import mirrored
from compressor.testing.memory import peak_bytes

N_EXPERTS, WIDTH = 12, 512
BF16 = torch.bfloat16
INT4 = dispatch.Problem("linear", "int4", 1, WIDTH, WIDTH, 64, BF16, "cpu", scale=BF16)
INT8 = dispatch.Problem("linear", "int8-bytes", 1, WIDTH, WIDTH, 0, BF16, "cpu", rounds="int")
WAYS = {
    "cpu-packed": ("int4", 64, BF16, ()),
    "cpu-int": ("int8-bytes", None, BF16, (Quantize(INPUT_FORMATS["int8-token"]),)),
    "cpu-table": ("nvfp4", 16, BF16, ()),
    "reference": ("int4", 64, torch.float32, ()),
}
FAST_ONLY = {"cpu-packed": kernel.accepts(INT4), "cpu-int": integers.accepts(INT8)}


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(0))
        self.down_proj = nn.Parameter(torch.empty(0))
        self.act_fn = Activation()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


def build(
    name: str, group: GroupSize, dtype: torch.dtype, inputs: tuple[InputOp, ...]
) -> tuple[PackedExperts, list[list[Tensor]]]:
    """Return experts whose weights are prepared, and what they decode to: gate, up and down of each."""
    fmt = get_format(name, group, BF16)
    generator = torch.Generator().manual_seed(5)
    experts, dense = [], []
    for _ in range(N_EXPERTS):
        layers = {}
        for role in ("gate", "up", "down"):
            w = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            q = mirrored(fmt, fmt.fit(w, fmt.fit_global([w])))
            layers[f"{role}_proj"] = PackedLinear(fmt.pack(fmt.encode(w, q), q), fmt, None, inputs, dtype)
        dense.append([layer.dequantize() for layer in layers.values()])
        experts.append(layers)
    source: Any = use_experts_implementation(Experts)(None)
    module = PackedExperts(source, experts, {role: f"{role}_proj" for role in ("gate", "up", "down")})
    for layer in _layers(module).values():
        layer.prepare()
    return module, dense


def _layers(module: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, PackedLinear)}


def routed(experts: list[int], per_expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens that go to each of these experts, `per_expert` to each."""
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(experts) * per_expert, generator=generator)
    index = torch.tensor(experts).repeat_interleave(per_expert)[order]
    x = torch.randn(len(index), WIDTH, generator=generator).to(dtype)
    return x, index[:, None], torch.rand(len(index), 1, generator=generator).to(dtype)


@pytest.mark.parametrize("way", WAYS)
def test_experts_run_one_by_one_and_only_where_tokens_go(way: str) -> None:
    if FAST_ONLY.get(way):
        pytest.skip(str(FAST_ONLY[way]))
    name, group, dtype, inputs = WAYS[way]
    module, dense = build(name, group, dtype, inputs)
    assert dispatch.pick(module.projection(0, "up").problem(1)).name == way
    called: list[str] = []
    for label, layer in _layers(module).items():
        layer.register_forward_hook(lambda *_, label=label: called.append(label))
    for per_expert in (1, 80):  # one row, and so many that every kernel decodes, where it can
        called.clear()
        x, index, share = routed([9, 4], per_expert, dtype)
        found = module(x, index, share)
        assert called == [f"{expert}.{role}_proj" for expert in (4, 9) for role in ("up", "gate", "down")]
        expected = torch.zeros(found.shape, dtype=torch.float64)
        for expert in (4, 9):
            rows = index[:, 0] == expert
            gate, up, down = (w.double() for w in dense[expert])
            entering = apply_ops(inputs, x[rows]).double()
            middle = torch.relu(entering @ gate.T) * (entering @ up.T)
            middle = apply_ops(inputs, middle.to(dtype)).double()
            expected[rows] = middle @ down.T * share[rows].double()
        assert (found.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_bounded_by_one_expert(way: str) -> None:
    if FAST_ONLY.get(way):
        pytest.skip(str(FAST_ONLY[way]))
    name, group, dtype, inputs = WAYS[way]
    module, _ = build(name, group, dtype, inputs)
    expert = 3 * WIDTH * WIDTH * 4  # decoded in float32
    peaks = {}
    for experts in ([3], list(range(N_EXPERTS))):
        batch = routed(experts, 66, dtype)
        flowing = 3 * batch[0].nbytes  # what comes in, goes out, and is summed up
        peaks[len(experts)] = peak_bytes(lambda batch=batch: module(*batch)) - flowing  # type: ignore[misc]
    assert peaks[1] < 1.5 * expert, peaks
    assert peaks[N_EXPERTS] < peaks[1] + expert / 4, peaks
