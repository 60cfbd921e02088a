"""Weights of which two in four are kept: the layout, the kernel, and layers of pruned models."""

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.kernels import dispatch
from compressor.kernels.gpu import kernel
from compressor.kernels.gpu.prepare import decode
from compressor.kernels.gpu.sparse import is_sparse, pack, unpack
from compressor.runtime.loader import execution_path
from compressor.runtime.pruned import PrunedLinear, leave_out_zeros
from compressor.testing.kernels import Interpreter
from compressor.testing.sparse_kernels import SparseCase, sparse_weight

CASES = [
    *(SparseCase(5, 72, 260, dtype) for dtype in ("float16", "bfloat16")),
    SparseCase(1, 33, 40, bias=True),
    SparseCase(20, 64, 512, "bfloat16", split=2, bias=True),
    SparseCase(9, 70, 256, registers=True),
    SparseCase(130, 64, 256, block_m=128),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64(interpreter: Interpreter, case: SparseCase) -> None:
    result = interpreter.check(case)
    assert result.error < 2e-6
    assert result.worst_row < 4e-6
    assert result.clean
    assert result.repeatable
    assert result.weights_exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (65, 260), (1030, 512)])
def test_weights_take_nine_bits_and_come_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = sparse_weight(*shape, dtype, generator())
    weight = pack(dense)
    assert weight is not None
    assert torch.equal(unpack(weight), dense)
    assert torch.equal(decode(weight), dense.float())
    rows, columns = weight.words.shape[0], 4 * weight.words.shape[1]
    assert 8 * weight.nbytes == 9 * rows * columns
    assert rows - shape[0] < 64
    assert columns - shape[1] < 256


def test_every_pattern_keeps_its_two_columns() -> None:
    rows = [[0.0] * 4 for _ in range(16)]
    for mask in range(16):
        rows[mask] = [float(10 * place + 1) if mask >> place & 1 else 0.0 for place in range(4)]
    few = torch.tensor([row for row in rows if sum(value != 0 for value in row) <= 2]).half()
    assert len(few) == 11
    weight = pack(few)
    assert weight is not None
    assert torch.equal(unpack(weight), few)


def test_what_is_not_sparse_enough_or_not_16_bits_wide_has_no_layout() -> None:
    dense = sparse_weight(1500, 64, torch.float16, generator())
    assert is_sparse(dense)
    dense[1400, 32:35] = 1
    assert not is_sparse(dense)
    assert pack(dense) is None
    assert pack(sparse_weight(4, 64, torch.float32, generator())) is None
    assert pack(torch.zeros(4, 66, dtype=torch.float16)) is None
    across = torch.zeros(1, 8, dtype=torch.float16)
    across[0, 2:6] = 1  # four neighbours, but two in either four
    assert pack(across) is not None


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels' operator serve this machine, too: in plain torch."""
    monkeypatch.setattr(kernel, "refuse_device", lambda problem: None)


def linear(k: int = 64, n: int = 24, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=torch.bfloat16)
    layer.weight.data = sparse_weight(n, k, torch.bfloat16, generator())
    return layer


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 3, 64, generator=generator(1)).to(dtype)


@pytest.mark.usefixtures("everywhere")
def test_layers_leave_zeros_out_and_save_what_they_were_given() -> None:
    dense = linear()
    layer = PrunedLinear.of(dense)
    assert layer is not None
    assert layer.is_packed
    assert [name for name, _ in layer.named_buffers()] == ["runtime_words", "runtime_bits"]
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    torch.testing.assert_close(layer(inputs()), dense(inputs()))
    saved = layer.state_dict()
    assert saved.keys() == dense.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in dense.state_dict().items())
    assert "2:4" in repr(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), layer(inputs()))


@pytest.mark.usefixtures("everywhere")
def test_layers_in_another_dtype_are_dense_and_come_back() -> None:
    dense = linear(bias=False)
    layer = PrunedLinear.of(dense)
    assert layer is not None
    layer.to(torch.float32)
    assert not layer.is_packed
    assert torch.equal(layer.weight, dense.weight.float())
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(layer(inputs(torch.float32)), nn.functional.linear(inputs(torch.float32), dense.weight.float()))
    layer.to(torch.float16)
    assert layer.is_packed
    assert torch.equal(layer.weight, dense.weight.half())


@pytest.mark.usefixtures("everywhere")
def test_models_keep_layers_that_are_dense_shared_or_watched() -> None:
    model = nn.Sequential(linear(), nn.Linear(24, 8, dtype=torch.bfloat16), linear(), linear(64, 64), linear(64, 64))
    model[3].weight = model[4].weight
    model[2].register_forward_pre_hook(lambda module, args: None)
    assert execution_path(model) == "dense-bfloat16"
    expected = model[1](model[0](inputs()))
    assert leave_out_zeros(model) == 1
    assert isinstance(model[0], PrunedLinear)
    assert [type(module) for module in list(model)[1:]] == [nn.Linear] * 4
    torch.testing.assert_close(model[1](model[0](inputs())), expected)
    assert execution_path(model) == "triton-bfloat16 (2:4)"


def test_nothing_is_left_out_without_a_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrunedLinear.of(linear()) is None  # a CPU has none
    monkeypatch.setattr(kernel, "refuse_device", lambda problem: None)
    monkeypatch.setenv(dispatch.ENV, "reference")
    assert PrunedLinear.of(linear()) is None
    monkeypatch.setenv(dispatch.ENV, "triton")
    assert PrunedLinear.of(linear()) is not None
    monkeypatch.setenv(dispatch.ENV, "nonsense")
    with pytest.raises(RecipeError, match="nonsense"):
        PrunedLinear.of(linear())
