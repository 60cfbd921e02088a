"""GPTQ against an example worked by hand, against the textbook in float64, and what it promises about its error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.calibration.stats import SecondMoment
from compressor.errors import NumericalError
from compressor.formats.base import QParams, ScaledFormat
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import Float4
from compressor.formats.fp8 import FP8
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.nvfp4 import NVFP4
from compressor.methods import columns
from compressor.methods.base import Layer
from compressor.methods.columns import Curvature, compensate, group_params, scale_choices, try_scales
from compressor.methods.gptq import GPTQ, GPTQOptions, input_order, stacked
from compressor.methods.grids import best_start, mse_clip, rows_of
from compressor.methods.rtn import RTN
from compressor.testing.formats import describe
from compressor.testing.grids import assert_same_params
from compressor.testing.layers import (
    correlated_inputs,
    fused_layers,
    heavy_tailed_weights,
    output_error,
    quantized,
    solve,
)

INT4 = IntFormat(4, 16, torch.bfloat16)
FORMATS: tuple[ScaledFormat, ...] = (
    INT4,
    IntFormat(2, 48, torch.float32),
    IntFormat(3, 16, torch.bfloat16, symmetric=False),
    IntFormat(4, None, torch.bfloat16),
    IntFormat(4, None, torch.float32, symmetric=False, per_tensor=True),
    NVFP4(),
    MXFP4(),
    Float4(),
    Codebook(3, 8, (0.0, 0.5, 1.0, 2.5, -0.5, -1.0, -2.0, -3.0)),
)
each = pytest.mark.parametrize("fmt", FORMATS, ids=describe)


def layer_of(fmt: ScaledFormat, x: Tensor, w: Tensor) -> Layer:
    return fused_layers((SecondMoment(),), fmt, [w], x)[0]


def decoded(fmt: ScaledFormat, layer: Layer, **options: object) -> Tensor:
    """Return what GPTQ makes of a layer's weight."""
    decision = quantized(solve(GPTQ(GPTQOptions(**options)), [layer], fmt).decisions[layer.ref.name])  # type: ignore[arg-type]
    return fmt.decode(decision.codes, decision.qparams)


def upper_factor(moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return `U` as the spec defines it, float64: the upper Cholesky factor of the inverse."""
    h = moment.double()[order][:, order]
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def textbook(
    w: Tensor, fmt: ScaledFormat, moment: Tensor, order: Tensor, q: QParams, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Return Algorithm 1 column by column in float64 without blocks, and how near each weight came to a tie.

    Every rounding goes through `encode` and `decode` of the whole matrix; one column is then taken from the result.
    """
    u = upper_factor(moment, order, damping)
    w, done = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    margin = torch.full(w.shape, torch.inf, dtype=torch.float64)
    for place, j in enumerate(order.tolist()):
        value = fmt.decode(fmt.encode(w.float(), q), q)[:, j].double()
        for nudge in (-1e-4, 1e-4):
            moved = fmt.decode(fmt.encode((w + nudge * w.abs().mean()).float(), q), q)[:, j].double()
            margin[moved != value, j] = 0
        done[:, j] = value
        error = (w[:, j] - value) / u[place, place]
        later = order[place + 1 :]
        w[:, later] -= error.unsqueeze(1) * u[place, place + 1 :]
    return done, margin


def test_the_worked_example() -> None:
    x = torch.tensor([[1, 1, 0], [1, 0.8, 0.5], [0.5, 0.6, -0.5], [2, 1.8, 0]])
    moment = 2 * x.T @ x / 4
    assert torch.allclose(moment, torch.tensor([[3.125, 2.85, 0.125], [2.85, 2.62, 0.05], [0.125, 0.05, 0.25]]))
    curvature = Curvature.of(moment, torch.arange(3), 0.01)
    assert curvature is not None
    upper = torch.tensor([[4.494198, -4.829252, -1.186415], [0, 0.616542, -0.114181], [0, 0, 1.92456]])
    assert torch.allclose(curvature.upper, upper, rtol=1e-4, atol=1e-6)
    assert torch.allclose(curvature.variance, upper.diagonal() ** -2, rtol=1e-4)
    fmt = IntFormat(4, None, torch.float32)
    w = torch.tensor([[0.67, 0.25, 0.13]])
    q = QParams(torch.tensor([[0.2]]))
    values, same = compensate(w, fmt, curvature, q, block=128)
    assert same is q
    assert (fmt.encode(values, q).int() - 8).tolist() == [[3, 2, 1]]
    assert (fmt.encode(w, q).int() - 8).tolist() == [[3, 1, 1]]
    for result, error in ((values, 0.030925), (fmt.round(w, q), 0.082925)):
        assert float((x @ (result - w).T).square().sum()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("order", ["none", "static"])
@pytest.mark.parametrize("block", [1, 24, 128])
@each
def test_scales_up_front_give_the_textbook_result(fmt: ScaledFormat, order: str, block: int) -> None:
    x = correlated_inputs(96, tokens=300, seed=1)
    w = heavy_tailed_weights(6, 96, seed=2)
    layer = layer_of(fmt, x, w)
    moment = layer.second_moment(SecondMoment())
    places = input_order(moment.diagonal(), order, fmt.group_size)
    expected, margin = textbook(w, fmt, moment, places, layer.fit(fmt))
    found = decoded(fmt, layer, order=order, grid="minmax", block_size=block)
    # Behind a weight that float32 may round the other way, everything may differ: such rows are left out.
    safe = (margin > 0).all(1)
    assert safe.sum() >= 3, "too many ties: the example shows little"
    assert torch.allclose(found[safe].double(), expected[safe], rtol=1e-6, atol=1e-12)
    assert not torch.equal(found, fmt.round(w, layer.fit(fmt))), "it is rounding to nearest"


@pytest.mark.parametrize("n", [1, 5, 33, 100])
def test_any_width_is_factored(n: int) -> None:
    x = correlated_inputs(max(n, 2), tokens=2 * n, seed=n)[:, :n]
    moment = x.T @ x / len(x)
    order = input_order(moment.diagonal(), "static", None)
    curvature = Curvature.of(moment, order, 0.01)
    assert curvature is not None
    expected = upper_factor(moment, order, 0.01)
    assert torch.allclose(curvature.upper.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(curvature.variance[order].double(), expected.diagonal() ** -2, rtol=1e-3)


def test_orders_by_hand() -> None:
    loud = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, 0.0, 3.0, 4.0])
    assert input_order(loud, "none", 2).tolist() == list(range(8))
    assert input_order(loud, "static", 2).tolist() == [4, 1, 7, 6, 2, 3, 0, 5]
    # Groups hold 6, 4, 9 and 7.
    assert input_order(loud, "group", 2).tolist() == [4, 5, 7, 6, 1, 0, 2, 3]
    assert input_order(loud, "group", None).tolist() == [4, 1, 7, 6, 2, 3, 0, 5]


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size], ids=describe)
@pytest.mark.parametrize("grid", ["output", "mse", "minmax"])
def test_scales_on_arrival_are_those_of_the_weights_as_they_are_then(fmt: ScaledFormat, grid: str) -> None:
    """Group by group by hand: errors of finished groups move the rest at once, and only then is the next scale chosen.

    The finished groups' columns of `U` alone say how: what they leave is `w_rest - E U[done, rest]`.
    """
    size = fmt.group_size or 0
    x = correlated_inputs(96, seed=3)
    w = heavy_tailed_weights(5, 96, seed=4)
    layer = layer_of(fmt, x, w)
    decision = quantized(
        solve(GPTQ(GPTQOptions(grid=grid)), [layer], fmt).decisions[layer.ref.name]  # type: ignore[arg-type]
    )
    moment = layer.second_moment(SecondMoment())
    order = input_order(moment.diagonal(), "group", size)
    curvature = Curvature.of(moment, order, 0.01)
    assert curvature is not None
    u, current = curvature.upper, w[:, order].clone()
    values = fmt.decode(decision.codes, decision.qparams)[:, order]
    for first in range(0, 96, size):
        own = slice(first, first + size)
        start = fmt.fit(current[:, own], layer.global_scale)
        expected = {
            "output": lambda part, q, block: try_scales(part, fmt, q, block),
            "mse": lambda part, q, block: mse_clip(part, fmt, q),
            "minmax": lambda part, q, block: q,
        }[grid](current[:, own], start, u[own, own])
        found = group_params(decision.qparams, int(order[first]) // size)
        # A float32 rounding error may decide between two scales; it cannot move one further.
        close = torch.isclose(fmt.steps(found), fmt.steps(expected), rtol=1e-6)
        assert close.float().mean() >= 0.8
        if found.zero_point is not None and expected.zero_point is not None:
            assert (found.zero_point == expected.zero_point).float().mean() >= 0.8
        for j in range(first, first + size):
            error = (current[:, j] - values[:, j]) / u[j, j]
            current[:, j + 1 :] -= error.unsqueeze(1) * u[j, j + 1 :]


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size], ids=describe)
def test_trials_find_the_scale_whose_loop_adds_least(fmt: ScaledFormat) -> None:
    """Every choice run on its own, with the sum of `(d_j / U_jj)^2` counted as the output error it adds."""
    size = fmt.group_size or 0
    x = correlated_inputs(size, seed=5)
    moment = x.T @ x / len(x)
    curvature = Curvature.of(moment, torch.arange(size), 0.01)
    assert curvature is not None
    w = heavy_tailed_weights(9, size, seed=6)
    start = fmt.fit(w)
    damped = moment.double() + 0.01 * moment.diagonal().double().mean() * torch.eye(size)
    totals = []
    for q in scale_choices(fmt, start):
        delta = compensate(w, fmt, curvature, q, 128)[0].double() - w.double()
        totals.append(((delta @ damped) * delta).sum(1))
    least = torch.stack(totals).amin(0)
    found = try_scales(w, fmt, start, curvature.upper)
    delta = compensate(w, fmt, curvature, found, 128)[0].double() - w.double()
    assert torch.allclose(((delta @ damped) * delta).sum(1), least, rtol=1e-4)
    assert (least < 0.99 * totals[0]).any(), "min-max was best everywhere: the example shows nothing"


@each
@pytest.mark.parametrize("order", ["group", "static", "none"])
def test_codes_decode_to_exactly_what_the_loop_rounded_to(fmt: ScaledFormat, order: str) -> None:
    x = correlated_inputs(96, seed=7)
    w = heavy_tailed_weights(6, 96, seed=8)
    layer = layer_of(fmt, x, w)
    moment = layer.second_moment(SecondMoment())
    curvature = Curvature.of(moment, input_order(moment.diagonal(), order, fmt.group_size), 0.01)
    assert curvature is not None
    for q in (layer.fit(fmt), mse_clip(w, fmt, layer.fit(fmt))):
        values, _ = compensate(w, fmt, curvature, q, 32)
        assert torch.equal(fmt.decode(fmt.encode(values, q), q), values)
    if fmt.group_size and order == "group":
        values, chosen = compensate(
            w, fmt, curvature, lambda part, u: try_scales(part, fmt, fmt.fit(part, layer.global_scale), u), 32
        )
        assert torch.equal(fmt.decode(fmt.encode(values, chosen), chosen), values)


@each
def test_the_output_error_is_below_rounding_and_the_defaults_are_best(fmt: ScaledFormat) -> None:
    """On calibration data, over twelve layers: rounding > usual GPTQ > the defaults."""
    sums = dict.fromkeys(("rtn", "none", "static", "default"), 0.0)
    worse = 0
    for seed in range(12):
        x = correlated_inputs(96, seed=seed)
        layer = layer_of(fmt, x, heavy_tailed_weights(8, 96, 100 + seed))
        errors = {"rtn": output_error(fmt.round(layer.weight, layer.fit(fmt)), layer, x)}
        for order in ("none", "static"):
            errors[order] = output_error(decoded(fmt, layer, order=order, grid="minmax"), layer, x)
        errors["default"] = output_error(decoded(fmt, layer), layer, x)
        worse += max(errors["none"], errors["static"], errors["default"]) > errors["rtn"]
        sums = {name: total + errors[name] for name, total in sums.items()}
    assert worse <= 1, f"{worse} of 12 layers are worse than rounding to nearest"
    assert max(sums["none"], sums["static"]) < 0.6 * sums["rtn"], sums
    assert sums["default"] < 0.98 * sums["static"], sums


def test_scales_up_front_follow_the_variance_left() -> None:
    x = correlated_inputs(96, seed=9)
    w = heavy_tailed_weights(5, 96, seed=10)
    for fmt in (INT4, NVFP4(), Float4()):
        layer = layer_of(fmt, x, w)
        moment = layer.second_moment(SecondMoment())
        curvature = Curvature.of(moment, input_order(moment.diagonal(), "static", None), 0.01)
        assert curvature is not None
        options = GPTQOptions(order="static")
        found = quantized(solve(GPTQ(options), [layer], fmt).decisions[layer.ref.name]).qparams
        if isinstance(fmt, IntFormat):
            assert_same_params(found, mse_clip(w, fmt, layer.fit(fmt), 2.0, curvature.variance))
        else:
            assert_same_params(found, best_start(w, fmt, layer.fit(fmt), curvature.variance))


def test_many_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated_inputs(64, seed=11)
    w = heavy_tailed_weights(50, 64, seed=12)
    for fmt in (IntFormat(3, 16, torch.bfloat16, symmetric=False), NVFP4(), Float4(), FORMATS[4]):
        layer = layer_of(fmt, x, w)
        whole = solve(GPTQ(), [layer], fmt).decisions[layer.ref.name]
        monkeypatch.setattr("compressor.methods.gptq._ROWS", 7)
        parts = solve(GPTQ(), [layer], fmt).decisions[layer.ref.name]
        monkeypatch.undo()
        same = quantized(whole).codes == quantized(parts).codes
        assert same.float().mean() > 0.99, "float32 sums in other shapes may differ in the last bit, and rarely do"
        assert quantized(parts).qparams.scale.shape == quantized(whole).qparams.scale.shape


def test_parameters_of_parts_are_joined_in_order() -> None:
    for fmt in (NVFP4(), IntFormat(4, 16, torch.bfloat16, symmetric=False), MXFP4()):
        q = fmt.fit(heavy_tailed_weights(7, 64))
        assert_same_params(stacked([rows_of(q, slice(0, 3)), rows_of(q, slice(3, 7))]), q)
        assert_same_params(columns._joined([group_params(q, group) for group in range(q.scale.shape[1])]), q)


def test_layers_that_read_the_same_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of one call that do not, do not."""
    calls: list[int] = []
    original = Curvature.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Curvature], moment: Tensor, order: Tensor, damping: float) -> Curvature | None:
        calls.append(len(order))
        result: Curvature | None = original(cls, moment, order, damping)
        return result

    monkeypatch.setattr(Curvature, "of", classmethod(counted))
    weights = [heavy_tailed_weights(4, 64, seed) for seed in range(3)]
    fused = fused_layers((SecondMoment(),), INT4, weights, correlated_inputs(64))
    together = solve(GPTQ(), fused, INT4)
    assert calls == [64]
    other = fused_layers((SecondMoment(),), INT4, weights[:1], correlated_inputs(64, seed=1))[0]
    other = replace(other, ref=replace(other.ref, name="other.weight"))
    mixed = solve(GPTQ(), [fused[0], other], INT4)
    assert calls == [64] * 3
    for outcome, layer in ((together, fused[0]), (mixed, fused[0]), (mixed, other)):
        alone = solve(GPTQ(), [layer], INT4).decisions[layer.ref.name]
        assert torch.equal(quantized(outcome.decisions[layer.ref.name]).codes, quantized(alone).codes)


def test_dead_inputs_are_rounded_to_nearest_and_counted() -> None:
    x = correlated_inputs(64, seed=13)
    x[:, [3, 20, 21]] = 0
    layer = layer_of(INT4, x, heavy_tailed_weights(6, 64, seed=14))
    outcome = solve(GPTQ(GPTQOptions(grid="minmax", order="static")), [layer], INT4)
    assert len(outcome.events) == 1
    assert layer.ref.name in outcome.events[0]
    assert "3 of 64 inputs" in outcome.events[0]
    decision = quantized(outcome.decisions[layer.ref.name])
    nearest = INT4.encode(layer.weight, layer.fit(INT4))
    assert torch.equal(decision.codes[:, [3, 20, 21]], nearest[:, [3, 20, 21]])
    assert not torch.equal(decision.codes, nearest)


def test_a_singular_moment_is_damped_until_it_can_be_factored() -> None:
    """Ten tokens span ten of 64 directions; float32 cannot tell the others from negative ones."""
    x = correlated_inputs(64, tokens=10, seed=15)
    layer = layer_of(INT4, x, heavy_tailed_weights(6, 64, seed=16))
    outcome = solve(GPTQ(GPTQOptions(damping=1e-12)), [layer], INT4)
    assert len(outcome.events) == 1
    assert f"{layer.ref.name}: the second moment is singular; damping grew from 1e-12 to 1e-" in outcome.events[0]
    assert not solve(GPTQ(), [layer], INT4).events
    assert output_error(decoded(INT4, layer, damping=1e-12), layer, x) < output_error(
        INT4.round(layer.weight, layer.fit(INT4)), layer, x
    )


def test_a_moment_no_damping_can_mend_is_refused() -> None:
    """Not a sum of squares at all, as after a defect: strongly indefinite."""
    layer = layer_of(INT4, correlated_inputs(64), heavy_tailed_weights(3, 64))
    total = layer.stats[SecondMoment()].value()
    total.fill_(0)
    total.diagonal().fill_(1.0)
    total[0, 1:] = total[1:, 0] = 1e6
    with pytest.raises(NumericalError, match=r"part0\.weight: the second moment of its 64 inputs cannot be factored"):
        solve(GPTQ(), [layer], INT4)


def test_a_layer_without_data_falls_back_and_says_so() -> None:
    layers = fused_layers((SecondMoment(),), INT4, [heavy_tailed_weights(3, 32, 1)], torch.zeros(0, 32))
    outcome = solve(GPTQ(), layers, INT4)
    assert outcome.events == (f"{layers[0].ref.name}: no calibration token reached it",)
    nearest = solve(RTN(), layers, INT4).decisions[layers[0].ref.name]
    assert torch.equal(quantized(outcome.decisions[layers[0].ref.name]).codes, quantized(nearest).codes)


def test_fp8_is_refused() -> None:
    layer = layer_of(INT4, correlated_inputs(32), heavy_tailed_weights(3, 32))
    assert "fp8-block" in str(GPTQ().refuse(layer.ref, FP8("block", torch.bfloat16)))
    assert all(GPTQ().refuse(layer.ref, fmt) is None for fmt in FORMATS)
