"""The packed kernels on a real device: what neither the interpreter nor the assembler shows."""

import pytest
import torch
from torch import nn

from compressor.formats import get_format
from compressor.kernels import dispatch
from compressor.kernels.gpu import launch, ops
from compressor.kernels.gpu.prepare import prepare
from compressor.kernels.gpu.samples import random_weight
from compressor.runtime.modules import PackedLinear
from compressor.runtime.pruned import PrunedLinear
from compressor.testing import expert_kernels, int_kernels, sparse_kernels
from compressor.testing.expert_kernels import ExpertCase
from compressor.testing.int_kernels import IntCase
from compressor.testing.kernels import KernelCase, build_weight, check
from compressor.testing.models import tiny_llama
from compressor.testing.sparse_kernels import SparseCase, sparse_weight

pytestmark = pytest.mark.gpu

LIMITS = {"float16": 5e-4, "bfloat16": 4e-3}
"""With float32 results: what rounding weights once leaves."""

ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 100, 128, 257)
FORMATS = [
    ("int2", 64),
    ("int3", 64),
    ("int4", 128),
    ("int4", 32),
    ("int4-asym", 64),
    ("int8", None),
    ("int8", 32),
    ("nvfp4", 16),
    ("mxfp4", 32),
    ("fp4:e2m1", None),
    ("fp4:e1m2", None),
    ("fp4:e3m0", None),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_every_format(name: str, group: int | None, dtype: str) -> None:
    for m, n, k in ((1, 256, 512), (16, 200, 576), (70, 1000, 1024)):
        result = check(KernelCase(name, group, m, n, k, dtype, bias=True), "cuda")
        assert result.error < LIMITS[dtype]
        assert result.worst_row < 2 * LIMITS[dtype]
        assert result.clean
        assert result.repeatable
        assert result.weights_exact


TABLES = [
    ("power4", 128, "bfloat16"),
    ("power4:0.3", None, "bfloat16"),
    ("power3:0.1", None, "float32"),
    ("codebook4", 64, "float32"),
    ("codebook4:skewed", None, "float32"),
    ("power3", 128, "bfloat16"),
    ("power2:0.3", None, "bfloat16"),
    ("codebook3:skewed", 64, "float32"),
    ("codebook2", 128, "float32"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "group", "scales"), TABLES)
def test_every_table(name: str, group: int | None, scales: str, dtype: str) -> None:
    for m, n, k in ((1, 256, 512), (16, 200, 576), (70, 1000, 1024)):
        result = check(KernelCase(name, group, m, n, k, dtype, scales, bias=True), "cuda")
        assert result.error < LIMITS[dtype]
        assert result.clean
        assert result.repeatable
        assert result.weights_exact


@pytest.mark.parametrize("inputs", ["int8-token", "int8-token-asym", "int8-tensor", "int6-token", "int4-token"])
@pytest.mark.parametrize(
    ("name", "group"), [("int8-bytes", None), ("int6", None), ("int4", None), ("int4", 64), ("int4", 128)]
)
def test_integers_are_exact(name: str, group: int | None, inputs: str) -> None:
    for m, n, k in ((1, 256, 512), (16, 200, 1152), (70, 1000, 1024), (300, 320, 4096)):
        for treated in (False, True):
            case = IntCase(name, group, inputs, m, n, k, "bfloat16", treated)
            result = int_kernels.check(case, "cuda")
            assert result.weights_exact
            assert result.error < 1e-6
            assert result.clean
            assert result.repeatable


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("inputs", ["fpq4:1", "fpq4:2"])
def test_small_floats_become_integers(inputs: str, dtype: str) -> None:
    for m, n, k in ((1, 256, 4096), (16, 200, 1152), (300, 320, 5000)):
        for x in ("normal", "nan"):
            result = int_kernels.check(IntCase("fp4", None, inputs, m, n, k, dtype, treated=m > 1, x=x), "cuda")
            assert result.weights_exact
            assert result.error < 1e-6
            assert result.clean
            assert result.repeatable


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("inputs", ["int8-token", "int4-token-asym"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inputs_are_turned_where_they_are_rounded(dtype: str, inputs: str, size: int) -> None:
    for m, k in ((1, 4096), (16, 1152), (70, 128), (5000, 1024)):
        for x in ("normal", "nan"):
            case = IntCase("int8-bytes", None, inputs, m, 64, k, dtype, treated=m == 16, rotated=size, x=x)
            result = int_kernels.check(case, "cuda")
            assert result.weights_exact
            assert result.error < 1e-6
            assert result.clean
            assert result.repeatable


@pytest.mark.parametrize("inputs", ["fp8-token", "fp8-tensor"])
def test_products_of_8_bit_floats(inputs: str) -> None:
    for m, n, k in ((1, 256, 512), (17, 208, 1152), (300, 320, 4096)):
        result = int_kernels.check(IntCase("fp8", None, inputs, m, n, k, "bfloat16"), "cuda")
        assert result.weights_exact
        assert result.error < LIMITS["bfloat16"]
        assert result.clean


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "group"), [("int4", 128), ("nvfp4", 16), ("mxfp4", 32), ("power4", None)])
def test_experts_in_one_launch(name: str, group: int | None, dtype: str) -> None:
    scales = "bfloat16" if name == "power4" else None
    for tokens, per_token, chosen in ((1, 2, "random"), (9, 2, "each"), (40, 4, "random"), (300, 2, "one")):
        case = ExpertCase(name, group, tokens, per_token, 6, 200, 576, dtype, scales, chosen)
        result = expert_kernels.check(case, "cuda")
        assert result.error < LIMITS[dtype]
        assert result.clean
        assert result.repeatable
        assert result.weights_exact


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_of_four_columns(dtype: str) -> None:
    for m, n, k in ((1, 256, 512), (16, 200, 576), (33, 1000, 1024), (64, 64, 4096), (300, 320, 1024)):
        result = sparse_kernels.check(SparseCase(m, n, k, dtype, bias=True), "cuda")
        assert result.error < 2e-6  # products of 16-bit numbers, added up in float32
        assert result.clean
        assert result.repeatable
        assert result.weights_exact


def test_layers_of_pruned_models_leave_zeros_out() -> None:
    dense = nn.Linear(512, 256, dtype=torch.bfloat16, device="cuda")
    dense.weight.data = sparse_weight(256, 512, torch.bfloat16, torch.Generator().manual_seed(0)).cuda()
    layer = PrunedLinear.of(dense)
    assert layer is not None
    for m in (1, 64, 200, 1000):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.state_dict()["weight"], dense.weight)
    assert torch.equal(layer.cpu().weight, dense.weight.cpu())


@pytest.mark.parametrize("m", ROWS)
def test_every_number_of_rows(m: int) -> None:
    for x in ("shifted", "outliers", "strided"):
        result = check(KernelCase("int4", 128, m, 320, 1024, "bfloat16", x=x), "cuda")
        assert result.error < LIMITS["bfloat16"]
        assert result.clean
        assert result.repeatable


@pytest.mark.parametrize("name", ["mxfp4", "fp4:e2m1", "fp4:e1m2", "fp4:e3m0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_smallest_codes_survive_subnormals(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name.partition(":")[0], 32 if name == "mxfp4" else None, dtype)
    packed, fmt, _ = build_weight(KernelCase(name, 32 if name == "mxfp4" else None, 0, 16, 32), torch.Generator())
    codes, q = fmt.unpack(packed)
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    q.scale.fill_(127 if name == "mxfp4" else 1)
    weight = prepare(fmt.pack(codes, q), fmt).to("cuda")
    out = ops.linear(torch.eye(32, dtype=dtype, device="cuda"), weight, None, dtype, "small")
    assert torch.equal(out.T.cpu().float(), fmt.decode(codes, q))


def test_paths_agree() -> None:
    weight = random_weight("int4", 512, 1024, "group", "cuda")
    x = torch.randn(48, 1024, dtype=torch.bfloat16, device="cuda")
    expected = ops.linear(x, weight, None, torch.bfloat16, "dequant").float()
    for path in ("small", "large"):
        found = ops.linear(x, weight, None, torch.bfloat16, path).float()
        assert (found - expected).norm() / expected.norm() < 4e-3


def test_weights_larger_than_the_buffer_are_written_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight("e2m1", 1000, 512, "nvfp4", "cuda")
    x = torch.randn(700, 512, dtype=torch.bfloat16, device="cuda")
    whole = ops.linear(x, weight, None, torch.bfloat16)
    monkeypatch.setattr(launch, "DENSE_BYTES", 512 * 2 * 128)
    torch.testing.assert_close(ops.linear(x, weight, None, torch.bfloat16), whole)


def test_graphs_replay_with_new_inputs_and_split_sums() -> None:
    ops.reserve(torch.device("cuda", torch.cuda.current_device()))
    weight = random_weight("int4", 512, 4096, "group", "cuda")
    x = torch.randn(4, 4096, dtype=torch.bfloat16, device="cuda")
    ops.linear(x, weight, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(x, weight, None, torch.bfloat16)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, ops.linear(x, weight, None, torch.bfloat16))


def test_more_than_two_to_the_31_weights() -> None:
    weight = random_weight("int2", 140_000, 16_384, "group", "cuda")
    x = torch.randn(1, 16_384, dtype=torch.bfloat16, device="cuda")
    tail = launch.dequantize(weight, torch.float32, 139_968, 140_000)
    found = ops.linear(x, weight, None, torch.bfloat16)[0, -32:].float()
    torch.testing.assert_close(found, (tail @ x[0].float()), rtol=2e-2, atol=2e-2)


def test_a_packed_model_generates() -> None:
    model = tiny_llama().to(torch.bfloat16).to("cuda")
    fmt = get_format("int8", 32, torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            q = fmt.fit(module.weight.detach().cpu())
            packed = fmt.pack(fmt.encode(module.weight.detach().cpu(), q), q)
            model.set_submodule(name, PackedLinear(packed, fmt, module.bias, dtype=torch.bfloat16).to("cuda"))
    tokens = torch.arange(12, device="cuda")[None]
    out = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > tokens.shape[1]
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    assert dispatch.pick(layer.problem(1)).name == "triton"
    assert any(name.startswith("runtime_") for name, _ in layer.named_buffers())
