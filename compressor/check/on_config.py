"""Checks of what config.json says, before any tensor is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from compressor.check.checkpoint import CONTAINER, DENSE, Checkpoint
from compressor.check.finding import Finding, error, info, warning
from compressor.errors import CompressorError
from compressor.formats.native import MODEL_TYPE_PREFIX


def what(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Say what kind of checkpoint this is."""
    packed = sorted(name for name in checkpoint.tensors if name.endswith(".weight_packed"))
    if checkpoint.container == DENSE and packed:
        yield error(
            "config.json",
            f"has no quantization_config, but {len(packed)} weights are stored packed, the first {packed[0]}",
            "readers would put random numbers there; restore the config that was written with the weights",
        )
    elif checkpoint.container == DENSE:
        yield info("config.json", "has no quantization_config: nothing is compressed here")
    elif checkpoint.container != CONTAINER:
        yield info("config.json", "native: only this package reads it; other readers raise on its model_type")


def status(checkpoint: Checkpoint) -> Iterator[Finding]:
    """`quantization_status` must be `compressed`, or packed weights load as random numbers without an exception."""
    assert checkpoint.section is not None
    if checkpoint.container == CONTAINER and (found := checkpoint.section.get("quantization_status")) != "compressed":
        said = "is missing" if found is None else f"is {found!r}"
        yield error("quantization_status", f"{said}: readers then load random weights", 'set it to "compressed"')


def schema(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every group must be what compressed-tensors' own schema accepts."""
    yield from _of(checkpoint, "config.schema")
    base, kind = checkpoint.config.get("base_model_type"), str(checkpoint.config.get("model_type"))
    if checkpoint.container not in (CONTAINER, DENSE) and kind != f"{MODEL_TYPE_PREFIX}{base}":
        yield error(
            "model_type",
            f"is {kind!r}: stock readers would load random weights instead of raising",
            f'native checkpoints have "{MODEL_TYPE_PREFIX}<base>" and "base_model_type"',
        )


def container(checkpoint: Checkpoint) -> Iterator[Finding]:
    """`format` must be set at both levels, and agree."""
    yield from _of(checkpoint, "config.format")


def targets(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Targets and ignore entries must be usable, and each must match something."""
    yield from _of(checkpoint, "config.targets")
    groups, model = checkpoint.groups, checkpoint.model
    if groups is None or groups.listed or isinstance(model, CompressorError):
        return
    modules = dict(model.module.named_modules())
    classes = {cls.__name__ for module in modules.values() for cls in type(module).__mro__}
    on_disk = {name.rpartition(".")[0] for name in checkpoint.tensors} | {name for name in checkpoint.modules}
    names = frozenset(modules) | on_disk
    lists = [(f"config_groups.{group.name}.targets", group.targets) for group in groups.matcher.groups]
    for where, entries in [*lists, ("ignore", groups.matcher.ignore)]:
        if idle := _idle(entries, names, classes):
            yield warning(
                where,
                f"{len(idle)} of {len(entries)} entries match no module: {', '.join(idle[:3])}",
                "a misspelt name? what it was meant for is treated like everything else",
            )


def special(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Sections beside the weights' schemes that change what a model computes."""
    assert checkpoint.section is not None
    if checkpoint.section.get("sparsity_config"):
        sparsity = checkpoint.section["sparsity_config"]
        name = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        if name not in (None, "dense"):
            yield error("sparsity_config", f"asks for {name!r}, which nothing reads any more", "write weights dense")
    for key in ("transform_config", "moe_sparsity_config"):
        if checkpoint.section.get(key):
            yield warning(key, "is set: compressor.load refuses such a model", "load it with the program it is for")


def _of(checkpoint: Checkpoint, check: str) -> Sequence[Finding]:
    return checkpoint.groups.findings.get(check, ()) if checkpoint.groups else ()


def _idle(entries: Sequence[str], names: frozenset[str], classes: set[str]) -> list[str]:
    """Return the entries that match neither a module's name nor a class."""
    idle = []
    for entry in entries:
        if entry.startswith("re:"):
            pattern = re.compile(entry[3:])
            if not any(pattern.match(name) for name in names):
                idle.append(entry)
        elif entry not in names and entry not in classes:
            idle.append(entry)
    return idle
