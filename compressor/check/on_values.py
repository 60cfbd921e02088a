"""Checks of the numbers themselves."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.check.checkpoint import DENSE, Checkpoint, Module
from compressor.check.finding import Finding, error, warning


def scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every scale, of groups, tensors and inputs, must be finite and not zero; positive, but for mirrored grids."""
    for module, facts in checkpoint.packed_facts.items():
        for suffix, counts in facts.scales.items():
            kinds = {"NaN or Inf": counts.not_finite, "zero": counts.zero}
            if suffix != "weight_scale" or not _may_be_mirrored(checkpoint.modules[module]):
                kinds["negative"] = counts.negative
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
            if said:
                yield error(f"{module}.{suffix}", f"{said} of {counts.total} scales", "the checkpoint is damaged")


def _may_be_mirrored(module: Module) -> bool:
    return module.scheme is not None and module.scheme.mirrors


def codes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every code must mean a number of the grid."""
    for name, facts in checkpoint.packed_facts.items():
        module = checkpoint.modules[name]
        if facts.bad_codes:
            yield error(
                name, f"{facts.bad_codes} codes mean NaN or lie outside {module.scheme}", "the checkpoint is damaged"
            )
        if facts.padding:
            yield warning(
                name, f"{facts.padding} rows have bits set behind their last code", "readers ignore those bits"
            )


def finite(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Dense tensors must be finite."""
    for name, facts in checkpoint.dense_facts.items():
        if facts.counts.not_finite:
            said = f"{facts.counts.not_finite} of {facts.counts.total} values are NaN or Inf"
            yield error(name, said, "the checkpoint is damaged, or the original was")


def zero(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A layer or an expert of zeros was never written, or lost in compression."""
    hint = "compress it again; if it is zero in the original too, leave it dense or remove it"
    for name, facts in checkpoint.packed_facts.items():
        if facts.all_zero:
            yield error(name, "every weight decodes to zero", hint)
    for name, dense in checkpoint.dense_facts.items():
        # In a dense checkpoint there is no compression to blame: models with empty layers exist.
        found = warning if checkpoint.container == DENSE else error
        if dense.all_zero:
            yield found(name, "every weight is zero", hint)
        for expert in dense.zero_experts:
            yield found(name, f"every weight of expert {expert} is zero", hint)
