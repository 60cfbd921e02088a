"""A block as a method sees it that decides all of its layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from compressor.calibration.capture import Capture
from compressor.calibration.store import Boundary
from compressor.checkpoint.attention import as_products
from compressor.engine.parts import Parts
from compressor.engine.rounding import InputRounding
from compressor.engine.solver import BlockOf
from compressor.engine.streams import COMPRESSED, FP
from compressor.formats.base import QuantFormat
from compressor.methods.base import Block, Layer
from compressor.plan import Kind


def block_of(
    parts: Parts,
    index: int,
    entering: Mapping[str, Boundary],
    leaving: Mapping[str, Boundary],
    rounding: InputRounding,
    ranges: Capture | None = None,
) -> BlockOf:
    """Return a function that shows a method its layers as one block, with what enters and what should leave it."""

    def forward(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        with as_products(parts.skeleton.model):
            return parts.streams.run(index, hidden, _as_parameters(parts, weights))

    def build(layers: Sequence[tuple[Layer, QuantFormat]]) -> Block:
        fp, compressed = parts.streams.stores[FP], parts.streams.stores[COMPRESSED]
        return Block(
            name=parts.plan.blocks[index],
            layers=tuple(layers),
            n_samples=parts.streams.n_samples,
            inputs=lambda sample: compressed.read(entering[COMPRESSED], sample),
            fp_inputs=lambda sample: fp.read(entering[FP], sample),
            targets=lambda sample: fp.read(leaving[FP], sample),
            forward=forward,
            device=parts.device,
            progress=parts.progress.stage,
            pieces=parts.pieces,
            rounding=partial(rounding.learning, ranges),
        )

    return build


def _as_parameters(parts: Parts, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn weights by tensor name into parameters by model name; experts become slices of their stack."""
    parameters: dict[str, Tensor] = {}
    for name, weight in weights.items():
        ref = parts.refs[name]
        whole = parts.skeleton.model.get_parameter(ref.param)
        if whole.shape == weight.shape or ref.kind is Kind.CONV:
            parameters[ref.param] = weight.view(whole.shape)
            continue
        if ref.param not in parameters:
            parameters[ref.param] = whole.detach().clone()
        ref.where.of(parameters[ref.param]).copy_(weight)
    return parameters
