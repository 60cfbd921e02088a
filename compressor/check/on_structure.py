"""Checks of layers that belong together: fused by runtimes, tied, or experts of one layer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from compressor.check.checkpoint import Checkpoint
from compressor.check.finding import Finding, error, info, warning
from compressor.check.groups import LINEAR
from compressor.check.model import Model
from compressor.errors import CompressorError
from compressor.plan import Kind
from compressor.stacks import BIASES
from compressor.weights import fused_id

_EXPERT = re.compile(r"(.*)\.(\d+)\.([^.]+)")
"""Module name of one expert's projection: head, index, leaf."""


def tied_head(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A tied output head has no weight of its own: it must be in `ignore`, and not stored quantized.

    The table it is tied to may be, in native checkpoints: there both read the packed one.
    """
    model, groups = _model(checkpoint), checkpoint.groups
    if groups is None:
        return
    for name, other in model.tied.items():
        head = name.removesuffix(".weight")
        if name.endswith(".weight") and head in model.linears and head not in checkpoint.modules:
            classes = [cls.__name__ for cls in type(model.linears[head]).__mro__]
            if (group := groups.takes_all((head,), classes)) is not None:
                yield error(
                    head,
                    f"is tied to {other}, but config_groups.{group} targets it: loading fails",
                    'add it to "ignore" in config.json',
                )
        table = other.removesuffix(".weight")
        for module in ({head} if groups.native else {head, table}) & checkpoint.modules.keys():
            yield error(module, f"is stored quantized, but {name} and {other} are tied", "store one dense copy")


def routers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Routers stay dense, and no other reader may take them for a quantized layer."""
    model, groups = _model(checkpoint), checkpoint.groups
    if not model.traced:
        yield warning("model", "its forward pass cannot be traced: routers are not recognised")
    if groups is None or groups.listed:
        return
    for name, target in model.targets.items():
        if target.param is None or model.kind(name) is not Kind.ROUTER:
            continue
        module = name.removesuffix(".weight")
        if module in checkpoint.modules:
            yield error(module, "is a router and stored quantized: tokens go to other experts", "keep it dense")
        elif target.param.removesuffix(".weight") not in model.linears and (
            group := groups.takes_all(checkpoint.names_of(module), LINEAR)
        ):
            yield warning(
                module,
                f"is a router that config_groups.{group} targets: runtimes where it is a linear layer look for "
                "packed tensors",
                'add it to "ignore" in config.json',
            )


def fused(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Layers that runtimes fuse (q, k and v; gate and up) must share scheme and ignore status."""
    model = _model(checkpoint)
    members: dict[str, dict[str, str]] = {}
    for name, target in model.targets.items():
        module = name.removesuffix(".weight")
        if module in checkpoint.modules and checkpoint.modules[module].scheme is None:
            continue  # that it has no scheme is another check's business
        if target.param is not None and module != name and model.kind(name) is Kind.LINEAR:
            members.setdefault(fused_id(name), {})[module] = stored_as(checkpoint, module)
    for schemes in members.values():
        if len(set(schemes.values())) > 1:
            first, *rest = schemes
            other = next(module for module in rest if schemes[module] != schemes[first])
            yield _for_vllm(
                checkpoint,
                first,
                f"is {schemes[first]}, but {other} is {schemes[other]}: vLLM fuses them and needs one scheme",
                "give all of them the same format, or leave all of them dense",
            )


def global_scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    """NVFP4 layers that runtimes fuse must share one global scale: vLLM takes the largest for all of them."""
    members: dict[tuple[str, str], dict[str, float]] = {}
    for module, facts in checkpoint.packed_facts.items():
        for suffix, value in facts.globals.items():
            members.setdefault((fused_id(f"{module}.weight"), suffix), {})[module] = value
    for (_, suffix), values in members.items():
        if len(set(values.values())) > 1:
            said = ", ".join(f"{module.rpartition('.')[2]} {value:.6g}" for module, value in values.items())
            yield _for_vllm(
                checkpoint,
                f"{next(iter(values))}.{suffix}",
                f"differs inside a fused set ({said}): vLLM uses the largest for all, which changes the weights",
                "compress the set together, with one global scale",
            )


def experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every expert must be there with every projection, stored one by one and all in the same way."""
    model = _model(checkpoint)
    stacks: dict[str, dict[tuple[str, str], set[int]]] = {}
    schemes: dict[str, dict[str, str]] = {}
    for name in model.targets:
        stack, found = model.stack_of(name), _EXPERT.fullmatch(name.removesuffix(".weight"))
        if stack is None or name.endswith(BIASES):
            continue
        module = name.removesuffix(".weight")
        schemes.setdefault(stack, {}).setdefault(stored_as(checkpoint, module), module)
        if found:
            indices = stacks.setdefault(stack, {}).setdefault((found[1], found[3]), set())
            indices.add(int(found[2]))
    for stack, projections in stacks.items():
        yield from _coverage(model, stack, projections)
    for stack, by_scheme in schemes.items():
        if len(by_scheme) > 1:
            (first, one), (second, other), *_ = by_scheme.items()
            hint = "treat all experts of a layer alike: readers choose one scheme for all of them"
            yield error(stack, f"{one} is {first}, but {other} is {second}", hint)
    kinds = {next(iter(by_scheme)): stack for stack, by_scheme in schemes.items() if len(by_scheme) == 1}
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        said = f"is {first}, but {other} is {second}: stock transformers chooses one scheme for all experts of a model"
        build = error if checkpoint.reader == "transformers" else warning
        yield build(one, said, "give all experts one format")


def tokens(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Calibration must have reached every layer it was used for; needs the report of the run."""
    rows = (checkpoint.report or {}).get("rows") or []
    seen = {row["name"]: int(row.get("tokens") or 0) for row in rows if row.get("action") not in ("kept", "rewritten")}
    if not any(seen.values()):
        return
    cold = [name for name, count in seen.items() if count == 0]
    if cold:
        yield warning(
            cold[0],
            f"{len(cold)} of {len(seen)} layers saw no calibration token, this one among them",
            "use more or other calibration data",
        )
    fewest = min((name for name in seen if seen[name]), key=lambda name: seen[name])
    yield info(fewest, f"saw the fewest calibration tokens of all that saw any: {seen[fewest]}")


def stored_as(checkpoint: Checkpoint, module: str) -> str:
    """Return how a module is stored, in words: its scheme, or `dense`."""
    found = checkpoint.modules.get(module)
    return "dense" if found is None else str(found.scheme or "of no known scheme")


def _coverage(model: Model, stack: str, projections: dict[tuple[str, str], set[int]]) -> Iterator[Finding]:
    parameters = dict(model.module.get_submodule(stack).named_parameters(recurse=False))
    count = parameters["down_proj"].shape[0]
    needed = 3 if "gate_up_proj" in parameters else 2
    if len(projections) < needed:
        leaves = ", ".join(sorted(leaf for _, leaf in projections))
        yield error(stack, f"has {leaves} for its experts, {needed} projections are needed", "it is incomplete")
    for (head, leaf), indices in sorted(projections.items()):
        absent = sorted(set(range(count)) - indices)
        if absent:
            shown = ", ".join(map(str, absent[:5]))
            yield error(
                f"{head}.{absent[0]}.{leaf}",
                f"is missing: {len(absent)} of {count} experts have no {leaf} ({shown}{', ...' * (len(absent) > 5)})",
                "the checkpoint is incomplete",
            )
        for index in sorted(indices - set(range(count))):
            yield error(f"{head}.{index}.{leaf}", f"is stored, but the model has {count} experts", "wrong config.json?")


def _for_vllm(checkpoint: Checkpoint, where: str, message: str, hint: str) -> Finding:
    """Build a finding about what only vLLM minds."""
    return (error if checkpoint.reader == "vllm" else warning)(where, message, hint)


def _model(checkpoint: Checkpoint) -> Model:
    assert not isinstance(checkpoint.model, CompressorError)
    return checkpoint.model
