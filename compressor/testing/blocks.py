"""Small blocks to try BLOCK-scope methods on, without a model or an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.calibration.stats import SecondMoment
from compressor.formats.base import QuantFormat
from compressor.methods.base import Block
from compressor.testing.layers import correlated_inputs, fused_layers, heavy_tailed_weights

Forward = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

SAMPLES = 8


def block_of(fmt: QuantFormat, weights: Sequence[Tensor], x: Tensor, shift: float = 0.0) -> Block:
    """Return a block of parallel linear layers: its output is all of theirs side by side.

    Args:
        fmt: The format of every layer.
        weights: `[out, in]` float32 each, equal `in`.
        x: Original inputs `[tokens, in]`, cut into `SAMPLES` samples (fewer if there are fewer tokens).
        shift: What the compressed prefix is off by, as a share of noise added to `x`.
    """

    def forward(hidden: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([F.linear(hidden, weight) for weight in params.values()], -1)

    return _block(fmt, weights, x, forward, [_same] * len(weights), shift)


def residual_mlp(fmt: QuantFormat, seed: int = 0, width: int = 48, hidden: int = 128, tokens: int = 1024) -> Block:
    """Return `y = x + GELU(LN(x) W1^T) W2^T` with heavy-tailed weights and correlated inputs.

    Args:
        fmt: The format of both weights.
        seed: Seed of weights and inputs.
        width: Width of `x`.
        hidden: Width in the middle.
        tokens: Tokens of all samples together.
    """
    weights = [heavy_tailed_weights(hidden, width, seed, 0.08), heavy_tailed_weights(width, hidden, seed + 100, 0.08)]

    def forward(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        first, second = params.values()
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), first)), second)

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,))

    def middle(x: Tensor) -> Tensor:
        return F.gelu(F.linear(normed(x), weights[0]))

    return _block(fmt, weights, correlated_inputs(width, tokens, seed), forward, [normed, middle], 0.0)


def _same(x: Tensor) -> Tensor:
    return x


def _block(
    fmt: QuantFormat,
    weights: Sequence[Tensor],
    x: Tensor,
    forward: Forward,
    reads: Sequence[Callable[[Tensor], Tensor]],
    shift: float,
) -> Block:
    """Return the block; `reads` says what each layer reads when `x` enters."""
    rng = torch.Generator().manual_seed(1)
    samples = [part[None] for part in x.chunk(SAMPLES)]
    shifted = [part + shift * part.std() * torch.randn(part.shape, generator=rng) for part in samples]
    entering = torch.cat(shifted, 1)[0]
    layers = [
        fused_layers((SecondMoment(),), fmt, [weight], read(entering))[0]
        for weight, read in zip(weights, reads, strict=True)
    ]
    named = []
    shared = fmt.fit_global(weights)
    for index, layer in enumerate(layers):
        name = f"model.layers.0.part{index}.weight"
        ref = type(layer.ref)(
            name,
            name,
            layer.ref.where,
            layer.ref.kind,
            layer.ref.shape,
            layer.ref.matrix,
            layer.ref.dtype,
            0,
            name,
            name,
        )
        named.append(type(layer)(ref, layer.weight, shared, layer.stats))
    original = {layer.ref.name: layer.weight for layer in named}
    with torch.no_grad():
        targets = [forward(part, original) for part in samples]
    return Block(
        name="model.layers.0",
        layers=tuple((layer, fmt) for layer in named),
        n_samples=len(samples),
        inputs=lambda sample: shifted[sample],
        fp_inputs=lambda sample: samples[sample],
        targets=lambda sample: targets[sample],
        forward=forward,
        device=torch.device("cpu"),
        progress=lambda text: None,
    )
