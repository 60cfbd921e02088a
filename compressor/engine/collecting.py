"""What is collected of a block's inputs, and by which process."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.calibration.capture import Capture
from compressor.calibration.coverage import Coverage
from compressor.calibration.stats import Statistic
from compressor.engine.experts import find_routers
from compressor.engine.parts import Parts
from compressor.engine.solver import Solver
from compressor.methods.base import Method, RouterMethod, Stream
from compressor.plan import Kind, LayerPlan


def prepare_capture(
    parts: Parts,
    layers: Sequence[LayerPlan],
    specs: tuple[Statistic, ...],
    among: Sequence[LayerPlan] | None = None,
    solver: Solver | None = None,
) -> Capture | None:
    """Prepare accumulators, one per tensor that compressed layers read.

    Args:
        parts: What the run works on.
        layers: Tensors of one block.
        specs: What is collected.
        among: Where routers are looked for, if not in `layers`.
        solver: Which will use it, and so divides the layers among processes, if not that of the run.
    """
    if not specs:
        return None
    widths, modules = {}, {}
    for layer in layers:
        if layer.format and layer.ref.matrix:
            widths[layer.ref.fed_by] = layer.ref.matrix[1]
            modules[layer.ref.fed_by] = parts.skeleton.model.get_submodule(layer.ref.param.rpartition(".")[0])
        elif rounds_routers(parts.method) and layer.ref.kind is Kind.ROUTER and layer.ref.matrix:
            widths[layer.ref.fed_by] = layer.ref.matrix[1]
            modules[layer.ref.fed_by] = parts.skeleton.model.get_submodule(layer.ref.owner)
        if layer.ref.fed_by in widths and "#" in layer.ref.fed_by:
            modules[layer.ref.fed_by] = parts.skeleton.model.get_submodule(layer.ref.fed_by.partition("#")[0])
    coverage, routers = Coverage(parts.min_expert_tokens), find_routers(among or layers, parts.skeleton)
    # What is folded, and a router that is rounded, every process changes for itself.
    by_all = rounds_routers(parts.method) or any(fold.block == layers[0].ref.block for fold in parts.plan.folds)
    keepers = {} if by_all else (solver or parts.solver).division(layers).keepers
    return Capture(widths, modules, specs, parts.device, coverage, routers, parts.ranks, keepers)


def count_experts(parts: Parts, layers: Sequence[LayerPlan]) -> Capture | None:
    """Prepare counting the tokens of experts for a method that looks at data but wants no statistics."""
    stacks = {layer.ref.fed_by: layer.ref.owner for layer in layers if layer.format and layer.ref.role}
    if parts.method.stream is Stream.NONE or not stacks:
        return None
    widths = dict.fromkeys(stacks, 0)
    modules = {fed_by: parts.skeleton.model.get_submodule(stack) for fed_by, stack in stacks.items()}
    return Capture(widths, modules, (), parts.device, ranks=parts.ranks)


def rounds_routers(method: Method) -> bool:
    """Return whether the method rounds routers."""
    return isinstance(method, RouterMethod) and method.router_bits > 0
