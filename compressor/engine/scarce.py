"""Experts that too few tokens reach, where a method learns by running the block: GPTQ decides them beforehand.

Such a method learns an expert from the tokens its router sends there, and from no others. What statistics rest on can
be topped up; so these experts are rounded on statistics, and lie in the block as they will be stored while it learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compressor.calibration.coverage import Coverage, by_stack
from compressor.calibration.store import Boundary
from compressor.engine.collecting import prepare_capture
from compressor.engine.parts import Parts
from compressor.engine.solver import Solved
from compressor.errors import UnsupportedError
from compressor.formats.base import QuantFormat
from compressor.methods import get_method
from compressor.methods.base import Block, Layer
from compressor.plan import LayerPlan


def scarce_experts(parts: Parts, layers: Sequence[LayerPlan], counted: Coverage) -> list[LayerPlan]:
    """Return the compressed weights of experts to which the router sends fewer tokens than are wanted."""
    short = counted.short_of(parts.min_expert_tokens)
    return [layer for layer in layers if layer.format and (layer.ref.owner, layer.ref.where.expert) in short]


def solve_scarce(
    parts: Parts, index: int, before: Mapping[str, Boundary], layers: Sequence[LayerPlan], scarce: Sequence[LayerPlan]
) -> Solved:
    """Round some experts of a block with GPTQ, on tokens topped up to the minimum, and put their values into it.

    Args:
        parts: What the run works on.
        index: The block, loaded and not changed yet.
        before: Streams that enter it.
        layers: All its tensors, its routers among them.
        scarce: What is rounded.

    Raises:
        CoverageError: There are too few tokens.
        NumericalError: See `GPTQ.round_with`.
    """
    solver = replace(parts.solver, method=get_method("gptq", {}))
    capture = prepare_capture(parts, scarce, solver.method.stats(solver.format_of(scarce[0])), layers, solver)
    assert capture is not None
    parts.streams.observe(index, before, capture)
    solved = solver.solve(scarce, capture, {}, _no_block)
    learns = parts.method.name
    solved.events = [
        *capture.coverage.events(),
        *(
            f"{stack}: {learns} learns from the tokens a router sends, which are fewer than {parts.min_expert_tokens} "
            f"for some experts; gptq rounded those, expert (tokens sent): {experts}"
            for stack, experts in by_stack(capture.coverage.routed).items()
        ),
        *solved.events,
    ]
    return solved


def _no_block(layers: Sequence[tuple[Layer, QuantFormat]]) -> Block:
    raise UnsupportedError(f"{layers[0][0].ref.name}: GPTQ looks at no block")
