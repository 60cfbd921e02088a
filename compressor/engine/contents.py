"""Which tensors a result holds: names, dtypes and shapes, all known from the plan."""

from __future__ import annotations

from collections.abc import Callable

from compressor.calibration import kv_cache
from compressor.checkpoint import operands
from compressor.checkpoint.source import DTYPES
from compressor.formats.activations import get_attention_format
from compressor.formats.base import QuantFormat, Slot
from compressor.formats.pruned import PRUNED
from compressor.inputs import stored_slots
from compressor.plan import OUTSIDE, LayerPlan, Operand, Plan


class Contents:
    """The tensors of a result.

    Args:
        plan: A sealed plan.
        format_of: Format of a compressed layer.
    """

    def __init__(self, plan: Plan, format_of: Callable[[LayerPlan], QuantFormat]) -> None:
        self.plan, self.format_of = plan, format_of
        self.default_dtype = DTYPES[plan.default_dtype]

    def slots(self) -> dict[str, Slot]:
        """Return name -> dtype and shape of every tensor, in plan order."""
        slots: dict[str, Slot] = {}
        for layer in self.plan.layers:
            slots |= self.of_layer(layer)
        for block in range(len(self.plan.blocks)):
            slots |= dict.fromkeys(self._cache_scales(block), Slot(self.default_dtype, (1,)))
            slots |= dict.fromkeys(self._operands(block), operands.SLOT)
        return slots

    def of_unit(self, block: int) -> list[str]:
        """Return the names of a unit's tensors.

        Args:
            block: Index of the block, or `OUTSIDE`.
        """
        names = [name for layer in self.plan.in_block(block) for name in self.of_layer(layer)]
        return names + (self._cache_scales(block) + self._operands(block) if block != OUTSIDE else [])

    def of_layer(self, layer: LayerPlan) -> dict[str, Slot]:
        """Return what is stored of one tensor of the source."""
        as_it_was = Slot(DTYPES[layer.ref.dtype], layer.ref.shape)
        if not layer.format:
            return {layer.ref.name: as_it_was}
        if layer.format == PRUNED:
            return {f"{layer.ref.module}.weight": as_it_was}
        assert layer.ref.matrix is not None
        weight = self.format_of(layer).layout(layer.ref.matrix)
        inputs = stored_slots(layer.steps, layer.ref.matrix, self.default_dtype)
        return {f"{layer.ref.module}.{suffix}": slot for suffix, slot in {**weight, **inputs}.items()}

    def _cache_scales(self, block: int) -> list[str]:
        """Return the names of the key/value cache scales of a block."""
        return [f"{module}.{suffix}" for module in self.plan.cached(block) for suffix in kv_cache.SCALES]

    def _operands(self, block: int) -> list[str]:
        """Return the names of what attention modules of a block store of their operands."""
        name = self.plan.operand_format(Operand.QUERY_KEY)
        if name is None or not get_attention_format(name).searched:
            return []
        return [f"{module}.{operands.SUFFIX}" for module in self.plan.rounded_attention(block)]
