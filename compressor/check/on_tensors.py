"""Checks of names, dtypes and shapes, from file headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compressor.calibration.kv_cache import SCALES as CACHE_SCALES
from compressor.check.checkpoint import DENSE, Checkpoint, Module
from compressor.check.finding import Finding, error
from compressor.checkpoint.operands import SLOT, SUFFIX
from compressor.errors import CompressorError, UnsupportedError
from compressor.formats.activations import ATTENTION_FORMATS
from compressor.plan import Kind
from compressor.runtime.layout import unexplained

_ZERO_POINTS = ("weight_zero_point", "input_zero_point")


def layout(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every quantized module must have exactly the tensors its scheme stores: suffixes, dtypes, shapes."""
    yield from layout_findings(checkpoint)


def layout_findings(checkpoint: Checkpoint) -> list[Finding]:
    """Return what is wrong with the stored tensors; `where` is the tensor's name."""
    return [finding for module in checkpoint.modules.values() for finding in _module_findings(checkpoint, module)]


def dense_beside_packed(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A module has one weight: dense or packed."""
    for module in checkpoint.modules.values():
        if "weight_packed" in module.tensors and "weight" in module.tensors:
            extra = module.tensors["weight"]
            yield error(
                f"{module.name}.weight",
                f"{extra.dtype} {list(extra.shape)} lies beside weight_packed: readers differ in which one they take",
                "remove the one that is not meant",
            )


def zero_points(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Symmetric schemes store no zero points: vLLM cannot load them."""
    for module in checkpoint.modules.values():
        if module.scheme is None:
            continue
        sides = {"weight_zero_point": module.scheme.symmetric}
        if module.scheme.inputs is not None:
            sides["input_zero_point"] = bool(module.scheme.inputs.get("symmetric", True))
        for suffix, symmetric in sides.items():
            if symmetric and suffix in module.tensors:
                yield error(
                    f"{module.name}.{suffix}", f"is stored, but {module.scheme} is symmetric", "remove the tensor"
                )


def group_sizes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Groups must divide the inputs of every quantized layer."""
    for module in checkpoint.modules.values():
        if module.scheme is not None and module.shape is not None and (reason := module.scheme.refuse(module.shape)):
            yield error(module.name, f"{module.scheme}: {reason}", "write it with a group size that divides")


def assigned(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What the config calls quantized must be stored so, and the other way round."""
    groups = checkpoint.groups
    if groups is None:
        return
    for module in checkpoint.modules.values():
        if module.group is not None:
            continue
        ignored = any(_ignored(checkpoint, name) for name in checkpoint.names_of(module.name))
        said = "the ignore list names it" if ignored else "no config group takes it"
        yield error(module.name, f"is stored quantized, but {said}", "readers expect a dense weight there")
    for name in sorted(set(groups.listed) - set(checkpoint.modules)):
        yield error(name, "is listed in config.json, but no tensor of it is stored", "the checkpoint is incomplete")
    if not groups.listed and not isinstance(checkpoint.model, CompressorError):
        yield from _dense_but_targeted(checkpoint)


def names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Everything the model needs must be there, and nothing it has no place for."""
    model = checkpoint.model
    assert not isinstance(model, CompressorError)
    covered, unexpected, wrong = set(), set(), []
    cache = bool(checkpoint.section and checkpoint.section.get("kv_cache_scheme"))
    rounded = (checkpoint.section.get("attention") if checkpoint.section else None) or {}
    stores = rounded.get("format") in ATTENTION_FORMATS and ATTENTION_FORMATS[rounded["format"]].searched
    operands = {f"{module}.{SUFFIX}" for module in rounded.get("modules", ())} if stores else set()
    for name in sorted(operands):
        have = checkpoint.tensors[name].shape if name in checkpoint.tensors else None
        if have != SLOT.shape:
            said = "is missing: the config rounds what it multiplies"
            said = said if have is None else f"is {list(have)}, not {list(SLOT.shape)}"
            wrong.append(error(name, said, "the checkpoint is incomplete or damaged"))
    for name, target in model.targets.items():
        module = name.removesuffix(".weight")
        if target.param is not None:
            covered.add(target.param)
            if module not in checkpoint.modules and target.simple and target.where.expert is None:
                have, need = checkpoint.tensors[name].shape, tuple(model.expected[target.param].shape)
                if have != need:
                    wrong.append(error(name, f"is {list(have)}, the model needs {list(need)}", "wrong config.json?"))
        elif name not in operands and not (cache and name.rpartition(".")[2] in CACHE_SCALES):
            codes = checkpoint.modules[module].codes if module in checkpoint.modules else None
            unexpected.add(codes.name if codes else name)
    for stored in checkpoint.modules.values():
        if stored.codes is None and f"{stored.name}.weight" in model.expected:
            covered.add(f"{stored.name}.weight")  # its codes are missing: the layout check says so
    missing, unexpected = unexplained(model.module, covered, unexpected, set(model.expected))
    for name in sorted(missing):
        yield error(name, "is missing: the model needs it", "the checkpoint is incomplete")
    for name in sorted(unexpected):
        yield error(name, "is stored, but the model has no place for it", "does config.json belong to these weights?")
    yield from wrong


def kv_cache(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A quantized key/value cache needs one positive scale for keys and one for values in every attention module."""
    section = checkpoint.section
    scheme = section.get("kv_cache_scheme") if section else None
    stored = {name for name in checkpoint.tensors if name.rpartition(".")[2] in CACHE_SCALES}
    if not scheme:
        return
    if scheme.get("dynamic"):
        return
    if not stored:
        yield error("kv_cache_scheme", "is set, but no k_scale or v_scale is stored", "the checkpoint is incomplete")
        return
    owners = {name.rpartition(".")[0] for name in stored}
    if not isinstance(checkpoint.model, CompressorError):
        owners |= _attention(checkpoint)
    for owner in sorted(owners):
        for suffix in CACHE_SCALES:
            if f"{owner}.{suffix}" not in stored:
                yield error(f"{owner}.{suffix}", "is missing, kv_cache_scheme needs it", "write the checkpoint again")
    for name, value in sorted(checkpoint.read(sorted(stored)).items()):
        values = value.float()
        if value.numel() != 1 or not bool((values > 0).all() & values.isfinite().all()):
            yield error(name, f"is {values.flatten()[:3].tolist()}, not one positive number", "write it again")


def _attention(checkpoint: Checkpoint) -> set[str]:
    """Names of the attention modules of the stack that any stored scale belongs to."""
    assert not isinstance(checkpoint.model, CompressorError)
    modules = (name for name, _ in checkpoint.model.module.named_modules())
    stored = {name.rpartition(".")[0] for name in checkpoint.tensors if name.rpartition(".")[2] in CACHE_SCALES}
    shapes = {_without_numbers(name) for name in stored}
    return {name for name in modules if _without_numbers(name) in shapes}


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _module_findings(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    codes = module.codes
    if codes is not None and len(codes.shape) == 3:
        yield error(
            codes.name,
            f"is one tensor {list(codes.shape)} for all experts",
            "store one set of tensors per expert and projection: readers look for those",
        )
        return
    if module.scheme is None or module.shape is None or module.scheme.refuse(module.shape) is not None:
        if checkpoint.container != DENSE and codes is None:
            yield error(f"{module.name}.weight_packed", "is missing, its scales are there", "it is incomplete")
        return
    try:
        expected = module.scheme.layout(module.shape)
    except UnsupportedError as problem:
        yield error(f"{module.name}.weight", problem.message, problem.hint)
        return
    for suffix, slot in expected.items():
        entry, name = module.tensors.get(suffix), f"{module.name}.{suffix}"
        if entry is None:
            yield error(name, f"is missing, {module.scheme} needs {slot}", "the checkpoint is incomplete")
        elif entry.dtype not in slot.dtypes or entry.shape != slot.shape:
            yield error(
                name,
                f"is {entry.dtype} {list(entry.shape)}, {module.scheme} of a matrix {list(module.shape)} needs {slot}",
                "does config.json belong to these weights?",
            )
        elif suffix == "weight_shape" and module.written != module.shape:
            yield error(name, f"says {module.written}, but the model needs {module.shape}", "wrong config.json?")
    for suffix in sorted(set(module.tensors) - set(expected) - {"weight", *_ZERO_POINTS}):
        yield error(f"{module.name}.{suffix}", f"is no tensor of {module.scheme}", "remove it, or fix the scheme")


def _dense_but_targeted(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Linear layers a reader would expect packed tensors for, but that are stored dense."""
    groups, model = checkpoint.groups, checkpoint.model
    assert groups is not None
    assert not isinstance(model, CompressorError)
    packed = {name for module in checkpoint.modules for name in checkpoint.names_of(module)}
    tied = set(model.tied)
    on_disk = model.on_disk
    for name, module in model.linears.items():
        if name in packed or f"{name}.weight" in tied:
            continue
        stored = on_disk.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        classes = [cls.__name__ for cls in type(module).__mro__]
        group = groups.takes_all(tuple(dict.fromkeys((stored, name))), classes)
        if group is not None and f"{stored}.weight" in checkpoint.tensors:
            yield _unpacked(stored, group)
    for name in checkpoint.tensors:
        module_name = name.removesuffix(".weight")
        if checkpoint.owner(name) is None and model.kind(name) is Kind.EXPERT:
            group = groups.group_of((module_name,))
            if group is not None:
                yield _unpacked(module_name, group)


def _unpacked(module: str, group: str) -> Finding:
    return error(
        module,
        f"is stored dense, but config_groups.{group} targets it: readers give it random weights",
        'add it to "ignore" in config.json, or store it quantized',
    )


def _ignored(checkpoint: Checkpoint, name: str) -> bool:
    """Whether taking the ignore list away would give a module to a group."""
    groups = checkpoint.groups
    assert groups is not None
    bare = replace(groups.matcher, ignore=())
    return bare.group_of(name, ("Linear", "Module")) is not None and name not in groups.listed
