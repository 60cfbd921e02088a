"""SparseGPT against the published loop in float64, written out here; the same loop with a format, or with a mask."""

import pytest
import torch

from compressor.decision import Masked, Quantized
from compressor.formats import get_format
from compressor.formats.pruned import PRUNED
from compressor.methods.base import relative_error
from compressor.pruning import get_method
from compressor.pruning.masks import Pattern
from compressor.pruning.wanda import Wanda
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights, output_error, solve

DENSE = get_format(PRUNED, None, torch.float32)


def published(
    w: torch.Tensor, x: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None = None, block: int = 128
) -> torch.Tensor:
    """The loop as published, float64, with exact counts."""
    w = w.double().clone()
    h = x.double().T @ x.double() / len(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for low in range(0, w.shape[1], block):
        high = min(low + block, w.shape[1])
        scores = (w[:, low:high] / u.diagonal()[low:high]) ** 2
        mask = torch.zeros_like(scores, dtype=torch.bool)  # True: pruned
        if pattern is None:
            flat = scores.flatten().argsort(stable=True)[: round(scores.numel() * sparsity)]
            mask.view(-1)[flat] = True
        errors = torch.zeros_like(scores)
        for j in range(low, high):
            if pattern and j % pattern[1] == 0:
                few = (w[:, j : j + pattern[1]] / u.diagonal()[j : j + pattern[1]]) ** 2
                worst = few.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
                mask[:, j - low : j - low + pattern[1]].scatter_(1, worst, True)
            q = w[:, j].clone()
            q[mask[:, j - low]] = 0
            e = (w[:, j] - q) / u[j, j]
            w[:, j:high] -= torch.outer(e, u[j, j:high])
            w[:, j] = q
            errors[:, j - low] = e
        w[:, high:] -= errors @ u[low:high, high:]
    return w


def pruned(w: torch.Tensor, x: torch.Tensor, **options: object) -> Masked:
    method = get_method("sparsegpt", options)
    (layer,) = fused_layers(method.stats(DENSE), DENSE, [w], x)
    decision = solve(method, [layer], DENSE).decisions[layer.ref.name]
    assert isinstance(decision, Masked)
    return decision


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_agrees_with_the_published_loop(sparsity: float, seed: int) -> None:
    w, x = heavy_tailed_weights(12, 200, seed), correlated_inputs(200, 600, seed)
    expected = published(w, x, sparsity)
    found = pruned(w, x, sparsity=sparsity)
    assert torch.equal(found.keep, expected != 0)
    assert torch.allclose(found.values.double(), expected, rtol=1e-3, atol=1e-4 * float(w.abs().max()))
    per_panel = [int((~found.keep[:, low:high]).sum()) for low, high in ((0, 128), (128, 200))]
    assert per_panel == [round(12 * 128 * sparsity), round(12 * 72 * sparsity)]


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_patterns_agree_with_the_published_loop(pattern: tuple[int, int]) -> None:
    w, x = heavy_tailed_weights(12, 192), correlated_inputs(192, 600)
    expected = published(w, x, 0.5, pattern)
    found = pruned(w, x, pattern=f"{pattern[0]}:{pattern[1]}")
    # In float32 a near tie may fall the other way, and moves what follows in its row; rows do not depend on each other.
    same = (found.keep == (expected != 0)).all(1)
    assert int(same.sum()) >= 11
    assert torch.allclose(found.values.double()[same], expected[same], rtol=1e-3, atol=1e-4 * float(w.abs().max()))


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 2], [1, 0, 0, 1]])
    w = torch.tensor([[1.0, 2, -1, 0.5], [0.5, -1, 2, 1]])
    found = pruned(w, x, pattern="2:4").values
    assert torch.allclose(found, torch.tensor([[1.0, 2, 0, 0], [0, 0, 1.837112, 0.998122]]), atol=1e-5)
    assert float(((x @ (found - w).T) ** 2).sum()) == pytest.approx(3.166688, abs=1e-5)


def test_moving_survivors_pays() -> None:
    """With the same mask the output is nearer than without updates, and nearer than Wanda's."""
    w, x = heavy_tailed_weights(24, 128), correlated_inputs(128, 500)
    found = pruned(w, x, sparsity=0.5)
    (layer,) = fused_layers(Wanda().stats(DENSE), DENSE, [w], x)
    still = torch.where(found.keep, w, 0)
    wanda = solve(Wanda(), [layer], DENSE).decisions[layer.ref.name]
    assert isinstance(wanda, Masked)
    errors = [output_error(values, layer, x) for values in (found.values, still, wanda.values)]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_dead_inputs_lose_their_weights() -> None:
    w, x = heavy_tailed_weights(8, 64), correlated_inputs(64, 300)
    x[:, 5] = 0
    found = pruned(w, x, sparsity=0.5)
    assert not found.values[:, 5].any()
    assert not found.keep[:, 5].any()
    assert torch.isfinite(found.values).all()


@pytest.mark.parametrize("name", ["int4", "int8", "nvfp4", "mxfp4", "int4-asym"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_rounds_in_the_same_loop(name: str, pattern: str | None) -> None:
    size = {"nvfp4": 16, "mxfp4": 32}.get(name, 32)
    fmt = get_format(name, size, torch.bfloat16)
    w, x = heavy_tailed_weights(16, 128), correlated_inputs(128, 500)
    options = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    method = get_method("sparsegpt", options)
    (layer,) = fused_layers(method.stats(fmt), fmt, [w], x)
    assert method.refuse(layer.ref, fmt) is None
    joint = solve(method, [layer], fmt).decisions[layer.ref.name]
    assert isinstance(joint, Quantized)
    assert joint.keep is not None
    decoded = fmt.decode(joint.codes, joint.qparams)
    assert not decoded[~joint.keep].any()
    if pattern:
        assert Pattern.parse(pattern).fits(joint.keep)
    else:
        assert int((~joint.keep).sum()) == round(w.numel() * 0.5)
    # One loop is better than pruning and then rounding to nearest.
    apart = pruned(w, x, **options).values
    q = fmt.fit(apart, fmt.fit_global([apart]))
    nearest = fmt.decode(fmt.encode(apart, q), q)
    assert output_error(decoded, layer, x) < output_error(nearest, layer, x)


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_gptq_keeps_the_zeros_of_a_pruned_matrix(name: str) -> None:
    fmt = get_format(name, {"nvfp4": 16}.get(name, 32), torch.bfloat16)
    w, x = heavy_tailed_weights(16, 128), correlated_inputs(128, 500)
    w = pruned(w, x, sparsity=0.5).values
    for order in ("group", "static", "none"):
        method = get_method("gptq", {"order": order})
        (layer,) = fused_layers(method.stats(fmt), fmt, [w], x)
        decision = solve(method, [layer], fmt).decisions[layer.ref.name]
        assert isinstance(decision, Quantized)
        decoded = fmt.decode(decision.codes, decision.qparams)
        assert not decoded[w == 0].any()
        q = layer.fit(fmt)
        assert output_error(decoded, layer, x) < output_error(fmt.decode(fmt.encode(w, q), q), layer, x)
        assert relative_error(w, decoded) < 0.5
