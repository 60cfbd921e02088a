"""LLM-FP4's joint search of weights and inputs: the spec's examples, its guarantees, and what offsets buy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.calibration.channels import MaxAbs
from compressor.calibration.samples import InputSample, LoudRows, strata
from compressor.calibration.stats import SecondMoment
from compressor.decision import Quantized
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.float4 import Float4
from compressor.formats.nvfp4 import NVFP4
from compressor.formats.small_floats import SPLITS, exponent_codes, largest_value, offsets_of, round_float
from compressor.inputs import Quantize, RoundFloat, rebuild, stored_slots
from compressor.methods.fp4 import FP4, FP4Options
from compressor.methods.fp4_inputs import JointSearch
from compressor.testing.layers import fused_layers, output_error


def grid(bits: int, mantissa: int) -> Tensor:
    """All magnitudes at bias 0, from the definition."""
    values = []
    for p in range(exponent_codes(bits, mantissa)):
        for f in range(2**mantissa):
            values.append(2 * f / 2**mantissa if p == 0 else 2.0**p * (1 + f / 2**mantissa))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("bits", "mantissa"), [(bits, m) for bits, splits in SPLITS.items() for m in splits])
def test_rounding_goes_to_the_nearest_value(bits: int, mantissa: int) -> None:
    values = grid(bits, mantissa)
    assert float(values[-1]) == largest_value(bits, mantissa)
    assert len(values.unique()) == 2 ** (bits - 1)
    assert torch.equal(round_float(values.float(), bits, mantissa).double(), values)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4000, generator=generator).exp() * torch.randn(4000, generator=generator) * 3
    x[0], x[1] = 1e30, -1e30
    best = (x.double().abs().clamp(max=float(values[-1]))[:, None] - values).abs().min(1).values
    rounded = round_float(x.clone(), bits, mantissa).double()
    assert torch.equal((rounded.abs() - x.double().abs().clamp(max=float(values[-1]))).abs(), best)
    assert torch.equal(rounded.sign().abs() * x.sign(), rounded.sign())


def test_splits_of_the_spec() -> None:
    assert {bits: sorted(splits) for bits, splits in SPLITS.items()} == {
        4: [0, 1, 2],
        6: list(range(5)),
        8: [2, 3, 4, 5, 6],
    }
    assert [largest_value(4, m) for m in (0, 1, 2)] == [128, 12, 3.5]
    assert [largest_value(6, m) for m in (1, 2, 3, 4)] == [49152, 224, 15, 3.875]
    assert [largest_value(8, m) for m in (2, 3, 4, 5, 6)] == [1.75 * 2**31, 61440, 248, 15.75, 3.96875]
    x = torch.tensor([0, 0.1, 0.25, 0.26, 0.75, 0.76, 1.25, 1.75, 2.5, 2.6, 3.5, 5, 5.1, 7, -0.74, -100])
    expected = {
        1: [0, 0, 0, 0.5, 1, 1, 1, 2, 2, 3, 4, 4, 6, 6, -0.5, -6],
        2: [0, 0, 0.25, 0.25, 0.75, 0.75, 1.25, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75, -0.75, -1.75],
        0: [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 4, 4, 4, 8, -1, -64],
    }
    for mantissa, values in expected.items():  # example E1, bias 1
        assert (round_float(x * 2, 4, mantissa) / 2).tolist() == pytest.approx(values)


def test_offsets_of_the_spec() -> None:
    """Example E3."""
    loudest = torch.tensor([12, 6, 3.5, 1])
    assert offsets_of(loudest, torch.tensor([1.0]), 4, 1).tolist() == [0, 1, 2, 3]
    assert offsets_of(loudest, torch.tensor([2**-0.6]), 4, 1).tolist() == [0, 0, 1, 3]
    loudest = torch.tensor([12, 6, 3.5, 1, 0.1, 0])
    assert RoundFloat.covering(4, 0, loudest, offsets=True).k.tolist() == [0, 1, 2, 4, 7, 7]
    assert RoundFloat.covering(4, 2, loudest, offsets=True).k.tolist() == [0, 1, 1, 1, 1, 1]
    op = RoundFloat.covering(4, 1, torch.tensor([12, 6, 3.5, 1]), offsets=True)
    x = torch.tensor([[12, -5.2, 3.4, 0.9], [-7.4, 2.2, -0.3, 0.12], [0.8, -6, 1.1, -1]])
    assert op.apply(x).tolist() == [[12, -6, 3, 1], [-8, 2, -0.25, 0.125], [1, -6, 1, -1]]
    plain = RoundFloat.covering(4, 1, torch.tensor([12, 6, 3.5, 1]), offsets=False)
    assert plain.apply(x).tolist() == [[12, -6, 3, 1], [-8, 2, 0, 0], [1, -6, 1, -1]]


def test_the_operation_is_stored_and_comes_back() -> None:
    op = RoundFloat.covering(6, 3, torch.rand(9, generator=torch.Generator().manual_seed(1)), offsets=True)
    assert op.describe() == INPUT_FORMATS["fpq6"].describe()
    slots = stored_slots([op.describe()], (5, 9), torch.bfloat16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in op.tensors().items()} == {
        name: (slot.dtype, slot.shape) for name, slot in slots.items()
    }
    (again,) = rebuild([op.describe()], op.tensors())
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.apply(x), op.apply(x))
    silent = RoundFloat.covering(4, 1, torch.zeros(3), offsets=True)
    assert (float(silent.scale), silent.k.tolist()) == (1, [0, 0, 0])


def search(w: Tensor, x: Tensor, offsets: bool, fmt: Float4, points: int = 100, rounds: int = 3) -> JointSearch:
    found = JointSearch(w, x, x.abs().amax(0), fmt, 4, offsets, points, fmt.fit(w))
    found.run(rounds)
    return found


def test_the_full_search_of_the_spec() -> None:
    """Example E4."""
    i, j = torch.arange(6.0)[:, None], torch.arange(8.0)
    w = 0.1 * torch.sin(1.3 * i + 0.7 * j**2 + 3.2)
    t = torch.arange(32.0)[:, None]
    x = torch.cos(0.9 * t + 1.7 * j + 0.9 * t * j) * torch.tensor([1, 2, 0.5, 8, 1, 0.25, 30, 1])
    reference = Float4("reference")
    found = search(w, x, True, reference)
    assert found.errors[-1] / (32 * 6) == pytest.approx(0.00467196, rel=0.02)
    assert [error / (32 * 6) for error in found.errors[:5]] == pytest.approx(
        [0.0439149, 0.0233840, 0.0164745, 0.0154775, 0.00641871], rel=0.02
    )
    assert (found.chosen, found.split) == (1, 2)  # E1M2 both: tables come E2M1, E1M2, E3M0
    assert found.op.k.tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    assert -float(found.op.scale.log2()) == pytest.approx(-2.576947, rel=1e-3)
    baseline = search(w, x, False, reference)
    assert baseline.errors[-1] / (32 * 6) == pytest.approx(0.00909163, rel=0.02)
    assert (baseline.chosen, baseline.split) == (0, 2)


def spread(seed: int) -> tuple[Tensor, Tensor]:
    """Return a weight and inputs whose channels differ log-normally, one of them 20 times as loud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 64, generator=generator) * torch.randn(64, generator=generator).exp()
    x[:, 5] *= 20
    return torch.randn(48, 64, generator=generator), x


@pytest.mark.parametrize("offsets", [True, False])
def test_steps_left_out_would_have_changed_nothing(offsets: bool) -> None:
    for seed in range(3):
        w, x = spread(seed)
        found = search(w, x, offsets, Float4(), points=10, rounds=4)
        whole = JointSearch(w, x, x.abs().amax(0), Float4(), 4, offsets, 10, Float4().fit(w))
        for _ in range(4):
            whole._weights_met = whole._inputs_met = None
            whole.run(1)
        assert found.errors == whole.errors
        assert torch.equal(found.q.scale, whole.q.scale)
        assert torch.equal(found.op.apply(x), whole.op.apply(x))


def test_errors_never_grow_and_offsets_pay() -> None:
    for seed in range(3):
        w, x = spread(seed)
        size = float((x @ w.T).square().sum())
        plain, full = (search(w, x, offsets, Float4(), points=50) for offsets in (False, True))
        for found in (plain, full):
            assert all(
                after <= before * (1 + 1e-5) for before, after in zip(found.errors, found.errors[1:], strict=False)
            )
        assert full.errors[-1] < 0.7 * plain.errors[-1]
        assert plain.errors[-1] < 0.9 * plain.errors[0]
        assert plain.errors[0] / size > 2 * full.errors[-1] / size


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_methods_layers_with_more_bits_are_closer(bits: int) -> None:
    w, x = spread(7)
    fmt = Float4()
    specs = (SecondMoment(), *FP4().input_stats(INPUT_FORMATS[f"fpq{bits}"]))
    layers = fused_layers(specs, fmt, [w], x)
    steps = (INPUT_FORMATS[f"fpq{bits}"].describe(),)
    layer = type(layers[0])(layers[0].ref, layers[0].weight, None, layers[0].stats, steps)
    outcome = FP4(FP4Options(points=20, rounds=2)).solve_group([layer], fmt, torch.Generator())
    decision = outcome.decisions[layer.ref.name]
    assert isinstance(decision, Quantized)
    (op,) = decision.inputs
    assert op.describe() == steps[0]
    decoded = fmt.decode(decision.codes, decision.qparams)
    error = float((op.apply(x) @ decoded.T - x @ w.T).norm() / (x @ w.T).norm())
    assert error < {4: 0.2, 6: 0.11, 8: 0.1}[bits]


def test_nvfp4_searches_the_global_scale_its_inputs_share() -> None:
    w, x = spread(3)
    x[:, 5] *= 30  # scales of most groups become coarse under the divisor that covers this channel
    fmt = NVFP4()
    specs = (SecondMoment(), *FP4().input_stats(INPUT_FORMATS["nvfp4"]))
    layers = fused_layers(specs, fmt, [w, 0.5 * w.flip(0)], x)
    steps = (INPUT_FORMATS["nvfp4"].describe(),)
    layers = [type(a)(a.ref, a.weight, a.global_scale, a.stats, steps) for a in layers]
    outcome = FP4().solve_group(layers, fmt, torch.Generator())
    covering = Quantize.calibrated(INPUT_FORMATS["nvfp4"], x.abs().max(), torch.float32)
    ops = []
    for layer in layers:
        decision = outcome.decisions[layer.ref.name]
        assert isinstance(decision, Quantized)
        (op,) = decision.inputs
        assert isinstance(op, Quantize)
        ops.append(op)
        decoded = fmt.decode(decision.codes, decision.qparams)
        exact = x @ layer.weight.T
        errors = [float((one.apply(x) @ decoded.T - exact).square().sum()) for one in (op, covering)]
        assert errors[0] <= errors[1] * 1.001
    assert ops[0].scale is not None
    assert torch.equal(ops[0].scale, ops[1].scale if ops[1].scale is not None else torch.zeros(1))


def test_samples_do_not_depend_on_how_rows_are_batched() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    kept = []
    for sizes in ([500], [100] * 5, [1, 49, 450]):
        total = InputSample(64).start(6, torch.device("cpu"))
        for rows in x.split(sizes):
            total.update(rows)
            total.close_lane()
        kept.append(total.value())
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert len(kept[0]) == 64
    where = [int((x == row).all(1).nonzero()) for row in kept[0]]
    assert where == sorted(where)
    assert min(where) < 50
    assert max(where) > 450
    assert total.max_abs == float(x.abs().max())
    small = InputSample(64).start(6, torch.device("cpu"))
    small.update(x[:10])
    assert torch.equal(small.value(), x[:10])


def test_the_loudest_rows_stand_for_themselves_and_others_for_the_rest() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    x[[77, 400]] *= 50
    kept = []
    for sizes in ([500], [100] * 5, [1, 49, 450]):
        total = LoudRows(8).start(6, torch.device("cpu"))
        for rows in x.split(sizes):
            total.update(rows)
            total.close_lane()
        kept.append(total.value())
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    where = [int((x == row).all(1).nonzero()) for row in kept[0]]
    assert where == sorted(x.abs().amax(1).topk(8).indices.tolist())
    rows, counts = strata(x[70:120], kept[0], len(x))
    assert float(counts.sum()) == pytest.approx(500)
    assert len(rows.unique(dim=0)) == len(rows)
    assert counts[-8:].tolist() == [1] * 8
    assert (counts[:-8] == counts[0]).all()
    every, once = strata(x, kept[0], len(x))
    assert once.tolist() == [1] * 500
    assert torch.equal(every.sort(0).values, x.sort(0).values)


def test_rare_loud_inputs_decide_how_far_the_grid_reaches() -> None:
    """A sample that misses them clips them; the error of all inputs is less where they are seen."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2000, 64, generator=generator)
        x[::500, 7] = 300.0
        w = torch.randn(32, 64, generator=generator)
        total = LoudRows(8).start(64, torch.device("cpu"))
        total.update(x)
        sample = x[1:57]
        errors = []
        for rows, counts in ((sample, None), strata(sample, total.value(), len(x))):
            start = Float4().fit(w)
            search = JointSearch(w, rows, x.abs().amax(0), Float4(), 4, True, 20, start, counts)
            search.run(2)
            errors.append(float((search.op.apply(x) @ Float4().round(w, search.q).T - x @ w.T).square().sum()))
        assert errors[1] < 0.8 * errors[0]


def test_more_inputs_than_the_search_sees_are_covered_by_the_largest_magnitudes() -> None:
    assert FP4().input_stats(INPUT_FORMATS["fpq4"]) == (InputSample(224), LoudRows(32), MaxAbs())
    assert FP4().input_stats(INPUT_FORMATS["int8-token"]) == ()
    w, x = spread(1)
    layer = fused_layers((SecondMoment(),), Float4(), [w], x)[0]
    assert output_error(w, layer, x) == 0
