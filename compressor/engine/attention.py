"""What is rounded inside attention: the key/value cache, and the operands of its products."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressor.calibration import kv_cache
from compressor.calibration.operands import OperandWatch
from compressor.calibration.store import Boundary
from compressor.checkpoint import operands
from compressor.checkpoint.skeleton import Skeleton
from compressor.engine.parts import Parts
from compressor.errors import UnsupportedError
from compressor.formats.activations import InputFormat
from compressor.methods.operands import OperandMethod, covering, require_finite


def quantize_cache(skeleton: Skeleton, name: str, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let an attention module compute with a quantized cache from now on."""
    module = skeleton.model.get_submodule(name)
    for suffix, scale in scales.items():
        module.register_buffer(suffix, scale, persistent=False)
    kv_cache.simulate(module)
    return {f"{name}.{suffix}": scale.cpu() for suffix, scale in scales.items()}


def round_operands(parts: Parts, index: int, fmt: InputFormat, before: Mapping[str, Boundary]) -> dict[str, Tensor]:
    """Let the block's attention modules round their operands from now on; returns what they store.

    Calibration samples pass once before: for what searches look at, and to see that operands can be seen at all.

    Raises:
        UnsupportedError: A module computes attention in a way of its own.
    """
    modules = {name: parts.skeleton.model.get_submodule(name) for name in parts.plan.rounded_attention(index)}
    watches = {name: OperandWatch() for name in modules}
    for name, module in modules.items():
        operands.treat(module, watches[name])
    parts.streams.watch(index, before)
    out = {}
    for name, module in modules.items():
        if not watches[name].kept:
            raise UnsupportedError(
                f"{name} ({type(module).__name__}): its operands cannot be seen", "leave --attention out"
            )
        require_finite(watches[name], name)
        if fmt.searched:
            ops = covering(watches[name], fmt.bits)
            if isinstance(parts.method, OperandMethod):
                ops = parts.method.solve_operands(watches[name], fmt.bits)
            out[f"{name}.{operands.SUFFIX}"] = values = operands.stored(ops)
            module.register_buffer(operands.SUFFIX, values.to(parts.device), persistent=False)
        operands.simulate(module, name, fmt)
    return out
