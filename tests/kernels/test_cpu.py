"""PyTorch's packed CPU operators: exact layouts, products against float64, dispatch, and whole models."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import RecipeError, UnsupportedError
from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.kernels import dispatch
from compressor.kernels.bench.__main__ import main
from compressor.kernels.cpu import bench, decode, kernel, layout, matmul
from compressor.kernels.cpu.prepare import NAMES, prepare
from compressor.kernels.dispatch import Problem
from compressor.kernels.reference.linear import dequantize, packed_linear
from compressor.runtime import PackedLinear, execution_path, load
from compressor.testing.checkpoints import write_compressed
from compressor.testing.grids import mirrored
from compressor.testing.models import sample_tokens, tiny_llama, tiny_olmoe

BF16 = torch.bfloat16
PROBLEM = Problem("linear", "int4", 1, 128, 256, 64, BF16, "cpu", scale=BF16)
GROUPS = (32, 96, 128, 512, None, "tensor")

pytestmark = pytest.mark.skipif(
    kernel.accepts(PROBLEM) is not None, reason=f"the operators do not run fast here: {kernel.accepts(PROBLEM)}"
)


def weight(
    name: str, group: int | str | None, shape: tuple[int, int], seed: int, dtype: torch.dtype = BF16
) -> tuple[PackedTensor, QuantFormat, Tensor]:
    """Return a packed weight of every code there is, its format, and what it decodes to."""
    generator = torch.Generator().manual_seed(seed)
    fmt = get_format(name, group, dtype)  # type: ignore[arg-type]
    w = torch.randn(shape, generator=generator) * torch.linspace(0.01, 2, shape[0])[:, None] + 0.3
    q = mirrored(fmt, fmt.fit(w))
    codes = torch.randint(0, 1 << fmt.bits, shape, generator=generator, dtype=torch.uint8)
    return fmt.pack(codes, q), fmt, fmt.decode(codes, q)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "group"), [(n, g) for n in NAMES for g in GROUPS if n != "int8-bytes" or g in (None, "tensor")]
)
def test_layouts_are_exact(name: str, group: int | str | None) -> None:
    packed, fmt, dense = weight(name, group, (70, 1536), seed=len(name))
    prepared = kernel.prepare(packed, fmt)
    restored = prepared.restore()
    assert restored.tensors.keys() == packed.tensors.keys()
    for suffix, tensor in packed.tensors.items():
        assert torch.equal(restored.tensors[suffix], tensor), suffix
    assert torch.equal(prepared.dequantize(torch.float32), dense)
    assert torch.equal(prepared.dequantize(BF16), dequantize(packed, fmt, BF16))


@pytest.mark.parametrize("x_mean", [0, 3])
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("int4", 64),
        ("int4", None),
        ("int4-asym", 32),
        ("int3-asym", 64),
        ("int2", 64),
        ("int8", 64),
        ("int8-asym", None),
        ("int5", 32),
        ("int8", None),
        ("int6", "tensor"),
        ("int8-bytes", None),
    ],
)
def test_products_against_float64(name: str, group: int | str | None, x_mean: int) -> None:
    packed, fmt, dense = weight(name, group, (100, 576), seed=7)
    prepared = prepare(packed, fmt)
    generator = torch.Generator().manual_seed(8)
    for m in (1, 3, 16, 130):
        x = (torch.randn(m, 576, generator=generator) + x_mean).bfloat16()
        expected = x.double() @ dense.double().T
        reference = error(packed_linear(x, packed, fmt, None, BF16), expected)
        for path in ("packed", "decode"):
            twice = path == "packed" and prepared.planes == 2  # results of both halves are rounded, and their sum
            limit = (2**0.5 if twice else 1.2) * reference + 1e-3 / m
            y = matmul.linear(x, prepared, None, BF16, path)
            assert y.dtype == BF16
            assert error(y, expected) < min(limit, 4e-3), (m, path)
            assert torch.equal(y, matmul.linear(x, prepared, None, BF16, path))


def test_zero_points_lose_nothing_to_bfloat16() -> None:
    # One zero point and scale whose product has more bits than bfloat16 holds, and inputs that add up what is lost.
    fmt = get_format("int4-asym", 64, BF16)
    codes = torch.full((16, 64), 15, dtype=torch.uint8)
    q = fmt.fit(torch.linspace(-0.3127, 0.4773, 1024).reshape(16, 64))
    assert q.zero_point is not None
    q = replace(q, scale=torch.full_like(q.scale, 0.0556640625), zero_point=torch.full_like(q.zero_point, 7))
    prepared = prepare(fmt.pack(codes, q), fmt)
    assert prepared.rest.numel()
    # 15 - 8 - 7: the weights are zero, so all that could be left is the rounding of the zero.
    y = matmul.linear(torch.full((1, 64), 100.0, dtype=BF16), prepared, None, BF16, "packed")
    assert y.abs().max() == 0
    without = replace(prepared, rest=prepared.rest[:0])
    assert matmul.linear(torch.full((1, 64), 100.0, dtype=BF16), without, None, BF16, "packed").abs().max() > 1


def test_bias_shapes_and_other_dtypes() -> None:
    packed, fmt, dense = weight("int4", 64, (50, 128), seed=3)
    prepared = kernel.prepare(packed, fmt)
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(50, generator=generator).bfloat16()
    x = torch.randn(256, 6, generator=generator).bfloat16().T.unflatten(0, (2, 3))[..., ::2]  # 3-D, with gaps
    y = prepared.linear(x, bias, BF16)
    assert y.shape == (2, 3, 50)
    assert error(y, x.double() @ dense.double().T + bias.double()) < 4e-3
    assert prepared.linear(torch.zeros(0, 128, dtype=BF16), bias, BF16).shape == (0, 50)
    # A model may widen activations; then nothing is rounded but the weight, as in the reference.
    wide = torch.randn(5, 128, generator=generator)
    expected = functional.linear(wide, dequantize(packed, fmt, BF16).float(), bias.float())
    torch.testing.assert_close(prepared.linear(wide, bias, BF16), expected)


@pytest.mark.parametrize(
    ("name", "group"), [("int4", 64), ("int4-asym", 64), ("int2-asym", None), ("int8-asym", 32), ("int8", None)]
)
def test_decoding_in_steps_and_parts_is_exact(name: str, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, fmt, dense = weight(name, group, (300, 576), seed=11)
    prepared = prepare(packed, fmt)
    generator = torch.Generator().manual_seed(12)
    x, bias = torch.randn(9, 576, generator=generator).bfloat16(), torch.randn(300, generator=generator).bfloat16()
    expected = functional.linear(x, dense.bfloat16(), bias)
    assert torch.equal(decode.decoded_linear(x, prepared, bias), expected)
    monkeypatch.setattr(decode, "AT_ONCE", 1 << 14)  # steps that groups do not divide
    monkeypatch.setattr(decode, "PART", 1 << 16)  # parts of one or two blocks, the last with padding
    y = decode.decoded_linear(x, prepared, bias)
    assert error(y, x.double() @ dense.bfloat16().double().T + bias.double()) < 4e-3
    size = prepared.outputs if prepared.planes else 64
    for rows, part in decode._parts(prepared, 2, size):
        assert part.shape == (min(2 * size, 300 - rows.start), 576)
        assert torch.equal(part, dense[rows].bfloat16())


def test_the_operator_that_decodes_passes_opcheck() -> None:
    prepared = prepare(*weight("int4-asym", 32, (20, 64), seed=2)[:2])
    tensors = (prepared.codes, prepared.scale, prepared.rest, prepared.zero_point)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    torch.library.opcheck(decode.decode_linear, (x, *tensors, None, 20, 64, 1, prepared.block, prepared.group))


def test_dispatch_chooses_by_rows_and_says_why() -> None:
    def name(problem: Problem) -> str:
        return dispatch.choose(problem, dispatch.KERNELS).name

    assert name(PROBLEM) == "cpu-packed"
    few = matmul.PACKED_ROWS[1]
    assert name(replace(PROBLEM, m=few)) == "cpu-packed"
    assert name(replace(PROBLEM, m=few + 1)) == "cpu-decode"
    assert name(replace(PROBLEM, format="int8", m=matmul.PACKED_ROWS[2] + 1)) == "cpu-decode"
    reasons = dict(dispatch.explain(replace(PROBLEM, m=few + 1)))
    assert f"{few + 1} rows: beyond {few} it is faster" in str(reasons["cpu-packed"])
    assert reasons["cpu-decode"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "not float32: the reference keeps them exact"),
        ({"dtype": torch.float16}, "not float16: slow"),
        ({"scale": torch.float32}, "bfloat16 scales, not float32"),
        ({"group": 16}, "not per 16"),
        ({"group": 0, "k": 200}, "not per 200"),
        ({"format": "nvfp4", "scale": None}, "no packed CPU operator for nvfp4"),
        ({"format": "int8", "group": 0, "k": 40}, "multiples of 16 inputs, not 40"),
        ({"n": 1 << 17, "k": 1 << 14}, "too many"),
        ({"device": "cuda"}, "not on cuda"),
        ({"op": "conv"}, "no 'conv'"),
    ],
)
def test_what_the_operators_do_not_take_goes_elsewhere(change: dict[str, object], why: str) -> None:
    problem = replace(PROBLEM, **change)  # type: ignore[arg-type]
    expected = "cpu-table" if problem.format == "nvfp4" else "reference"
    assert dispatch.choose(problem, dispatch.KERNELS[1:]).name == expected
    reasons = dict(dispatch.explain(problem))
    assert all(why in str(reasons[name]) for name in ("cpu-packed", "cpu-decode"))


def test_groups_within_whole_rows() -> None:
    # A scale per row is one per 256 inputs, many times; rows of 40 inputs only fit the byte operator's reference.
    assert prepare(*weight("int4", None, (20, 512), seed=1)[:2]).group == 256
    assert prepare(*weight("int4", 96, (20, 192), seed=1)[:2]).group == 32
    with pytest.raises(UnsupportedError, match="groups of 16"):
        prepare(*weight("int4", 16, (20, 64), seed=1)[:2])
    with pytest.raises(UnsupportedError, match="no CPU operator takes int4 or its scales"):
        prepare(*weight("int4", 64, (20, 64), seed=1, dtype=torch.float32)[:2])


def test_another_layout_of_the_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_BLOCK_ROWS", {torch.backends.cpu.get_cpu_capability(): 16})
    layout.block_rows.cache_clear()
    try:
        assert layout.block_rows() is None
        assert "not known" in str(kernel.accepts(PROBLEM))
    finally:
        monkeypatch.undo()
        layout.block_rows.cache_clear()


def test_forcing_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, fmt, _ = weight("int4", 64, (64, 128), seed=5)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    results = {}
    for name in ("cpu-packed", "cpu-decode", "reference"):
        monkeypatch.setenv(dispatch.ENV, name)
        layer = PackedLinear(packed, fmt, dtype=BF16)
        results[name] = layer(x)
        assert dispatch.pick(layer.problem(1)).name == name
        assert (layer._prepared is None) == (name == "reference")
    assert torch.equal(results["cpu-decode"], results["reference"])
    assert error(results["cpu-packed"], results["reference"].double()) < 4e-3
    monkeypatch.setenv(dispatch.ENV, "cpu")
    with pytest.raises(RecipeError):
        dispatch.pick(layer.problem(1))


@pytest.mark.parametrize("fmt", ["int4", "int4-asym", "int8", "int3"])
def test_a_whole_model(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(31, kv_heads=2).to(BF16)
    write_compressed(model, tmp_path, get_format(fmt, 64, BF16))
    fast = load(tmp_path, dtype=BF16)
    assert execution_path(fast) == f"cpu-packed-bfloat16 (packed {fmt})"
    assert execution_path(fast, 512) == f"cpu-decode-bfloat16 (packed {fmt})"
    assert execution_path(load(tmp_path)) == f"reference-float32 (packed {fmt})"
    monkeypatch.setenv(dispatch.ENV, "reference")
    plain = load(tmp_path, dtype=BF16)
    exact = load(tmp_path)
    monkeypatch.delenv(dispatch.ENV)
    tokens = sample_tokens(model, seed=9)
    with torch.no_grad():
        expected = exact(tokens).logits.double()
        ours, theirs = (error(side(tokens).logits, expected) for side in (fast, plain))
        assert ours < 1.2 * theirs + 2e-3
        whole, entering = fast(tokens).logits, []
        head = fast.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].stride()))
        torch.testing.assert_close(fast(tokens, logits_to_keep=1).logits, whole[:, -1:])
        assert entering == [(head.in_features, head.in_features, 1)]  # PyTorch would copy the weight for others
        handle.remove()
        rows = fast(tokens[:1, :1].expand(1, 200)).logits  # decoded once
        assert error(rows, exact(tokens[:1, :1].expand(1, 200)).logits.double()) < 1.2 * theirs + 2e-3
    # Stored as it was: saving gives the bytes on disk, moving to another dtype leaves them alone.
    state, reference = fast.state_dict(), plain.state_dict()
    names = [name for name in reference if "_packed" in name or "weight_" in name]
    assert names
    assert all(torch.equal(state[name], reference[name]) for name in names)
    size = sum(tensor.nbytes for layer in _layers(fast) for tensor in layer.buffers())
    assert size < 0.85 * sum(2 * layer.in_features * layer.out_features for layer in _layers(fast))


def _layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, PackedLinear)]


def test_experts_and_compilation(tmp_path: Path) -> None:
    model = tiny_olmoe(5).to(BF16)
    write_compressed(model, tmp_path, get_format("int4", 64, BF16))
    fast, exact = load(tmp_path, dtype=BF16), load(tmp_path)
    tokens = sample_tokens(model, seed=2)
    with torch.no_grad():
        # A router may send a token elsewhere after rounding; most go where they should.
        gap = (fast(tokens).logits - exact(tokens).logits).norm(dim=-1) / exact(tokens).logits.norm(dim=-1)
        assert gap.median() < 0.03
    layer = _layers(fast)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 200):  # packed, and decoded
        x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    out = fast.generate(tokens[:1, :6], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 6


@pytest.mark.slow
def test_one_token_is_twice_as_fast_as_dense() -> None:
    packed, fmt, dense = weight("int4", 64, (4096, 4096), seed=1)
    copies = 3  # 24 MB of codes, so that the cache of the last call does not serve the next
    layers = [PackedLinear(packed, fmt, dtype=BF16) for _ in range(copies)]
    matrices = [dense.bfloat16().clone() for _ in range(copies)]
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(2)).bfloat16()
    best = {"packed": float("inf"), "dense": float("inf")}
    for turn in range(20):
        started = time.thread_time()
        layers[turn % copies](x)
        between = time.thread_time()
        functional.linear(x, matrices[turn % copies])
        if turn >= copies:
            best["packed"] = min(best["packed"], between - started)
            best["dense"] = min(best["dense"], time.thread_time() - between)
    assert best["dense"] / best["packed"] > 2, best


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.FORMATS)
def test_no_kernel_is_slower_than_decoding_and_multiplying(name: str) -> None:
    """With a margin for a busy machine; what it is measured against decodes and multiplies in the same process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cells = bench.measure(name, (768, 768), (1, 4, 16, 64, 512), rounds=9)
    finally:
        torch.set_num_threads(threads)
    slower = {cell.m: (cell.kernel, cell.over_decoded) for cell in cells if cell.over_decoded < 0.85}
    assert not slower, slower
    if name == "int4 g64":
        assert cells[0].over_dense > 1.5, cells[0]  # of a small layer; large ones are the test above


def test_the_bench_times_what_dispatch_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--layer", "64x128", "--rows", "1", "80", "--format", "int4 g64", "nvfp4", "int8 channel"]
    threads = torch.get_num_threads()
    try:
        assert main(["--cpu", *chosen, "--rounds", "2", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "cpu.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    cells = json.loads((tmp_path / "cpu.json").read_text())["cells"]
    kernels = [(cell["format"], cell["m"], cell["kernel"]) for cell in cells]
    assert kernels == [
        ("int4 g64", 1, "cpu-packed"),
        ("int4 g64", 80, "cpu-decode"),
        ("nvfp4", 1, "cpu-table"),
        ("nvfp4", 80, "cpu-table"),
        ("int8 channel", 1, "cpu-packed"),
        ("int8 channel", 80, "cpu-decode"),
    ]
    for cell in cells:
        assert cell["seconds"] > 0
        assert cell["over_decoded"] > 0
        assert cell["error"] < 4e-3
    assert cells[0]["repack"] > 0
    assert "least" in text
    for wrong in (["--format", "int9 g64"], ["--layer", "70B o"]):
        with pytest.raises(SystemExit) as caught:
            main(["--cpu", *wrong])
        assert caught.value.code == 2
    forced = bench.measure("int4 g64", (64, 128), (1,), rounds=1, forced=True)[0].forced
    assert forced.keys() == {"packed", "decode"}
    assert min(forced.values()) > 0
