"""Reading a `quantization_config` that may be wrong: what can be understood, and a list of what cannot.

What is allowed inside a group is asked of compressed-tensors' own schema, which is what other readers raise by.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from pydantic import ValidationError

from compressor.check.finding import Finding, error, warning
from compressor.check.scheme import NATIVE, REMOVED, Scheme
from compressor.formats.native import NativeSchemes
from compressor.formats.schemes import Group, Schemes

MIXED = "mixed-precision"
LINEAR = ("Linear", "Module")
"""What readers take a module for whose class they do not have: experts are linear layers on disk."""

_KNOWN = frozenset(entry.value for entry in CompressionFormat) - {*REMOVED, MIXED, CompressionFormat.dense.value}


@dataclass(frozen=True)
class Groups:
    """Which module is stored how.

    Attributes:
        schemes: Group key -> scheme, or None for a group that cannot be understood.
        matcher: Targets and ignore list, for compressed-tensors.
        listed: Module -> group key, for native checkpoints.
        findings: What is wrong, by check id.
    """

    schemes: Mapping[str, Scheme | None]
    matcher: Schemes
    listed: Mapping[str, str]
    findings: Mapping[str, tuple[Finding, ...]]

    @property
    def native(self) -> bool:
        """Whether this is a native config, which lists its modules by name."""
        return any(scheme is not None and scheme.container == NATIVE for scheme in self.schemes.values())

    def group_of(self, names: Sequence[str], classes: Sequence[str] = LINEAR) -> str | None:
        """Return the key of the group that takes a module, or None.

        Args:
            names: Its name on disk, and its name in memory where that is known: configs use either.
            classes: Names of its class and base classes.
        """
        if self.listed:
            return self.listed.get(names[0])
        found = (self.matcher.group_of(name, classes) for name in names)
        return next((group.name for group in found if group), None)

    def takes_all(self, names: Sequence[str], classes: Sequence[str]) -> str | None:
        """Return the key of the group that takes a module under each of its names, or None."""
        found = [self.matcher.group_of(name, classes) for name in names]
        return None if self.listed or None in found or found[0] is None else found[0].name


def read_native(section: Mapping[str, Any], dtype: torch.dtype) -> Groups:
    """Read the config of a native checkpoint.

    Raises:
        CheckpointError: It is damaged, or newer than this package.
    """
    parsed = NativeSchemes.parse(section)
    schemes: dict[str, Scheme] = {}
    listed = {}
    for module, index in parsed.modules.items():
        fmt = parsed.find((module,), dtype)
        assert fmt is not None, module
        steps = parsed.steps((module,))
        key = f"formats[{index}]" + (f" inputs[{parsed.module_inputs[module]}]" if steps else "")
        schemes[key] = Scheme(key, NATIVE, {}, native=fmt, steps=steps)
        listed[module] = key
    return Groups(schemes, Schemes((), ()), listed, {})


def read_groups(section: Mapping[str, Any]) -> Groups:
    """Read the config of a compressed-tensors checkpoint, however wrong it is."""
    found: dict[str, list[Finding]] = {"config.schema": [], "config.format": [], "config.targets": []}
    entries = section.get("config_groups")
    if not isinstance(entries, Mapping) or not entries:
        found["config.schema"].append(error("config_groups", "is missing or empty", "nothing says what is quantized"))
        entries = {}
    schemes: dict[str, Scheme | None] = {}
    matched: list[Group] = []
    for key, entry in entries.items():
        scheme, problems = _validated(str(key), entry)
        found["config.schema"] += problems
        if scheme is None:
            schemes[key] = None
            targets = entry.get("targets") if isinstance(entry, Mapping) else None
            matched.append(Group(key, tuple(_patterns(targets, key, found["config.targets"])), "", {}))
            continue
        container = _container(str(key), scheme, section.get("format"), found["config.format"])
        weights = scheme.weights.model_dump() if scheme.weights else {}
        inputs = scheme.input_activations.model_dump() if scheme.input_activations else None
        schemes[key] = Scheme(key, container, weights, inputs) if container and weights else None
        targets = tuple(_patterns(scheme.targets, f"config_groups.{key}.targets", found["config.targets"]))
        matched.append(Group(key, targets, container or "", weights))
    found["config.format"] += _top_level(section.get("format"), schemes.values())
    found["config.targets"] += _mixed_targets(matched)
    ignore = tuple(_patterns(section.get("ignore") or [], "ignore", found["config.targets"]))
    return Groups(schemes, Schemes(tuple(matched), ignore), {}, {key: tuple(value) for key, value in found.items()})


def _validated(key: str, entry: Any) -> tuple[QuantizationScheme | None, list[Finding]]:
    """Validate one group by compressed-tensors' schema; keys it forbids are reported and left out."""
    problems: list[Finding] = []
    entry = copy.deepcopy(entry)
    for _ in range(2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if isinstance(entry, list):  # a preset's name with its targets
                    return preset_name_to_scheme(key, entry), problems
                return QuantizationScheme.model_validate(entry), problems
        except ValidationError as invalid:
            extra = [item["loc"] for item in invalid.errors() if item["type"] == "extra_forbidden"]
            for item in invalid.errors():
                where = ".".join(["config_groups", key, *map(str, item["loc"])])
                if item["type"] == "extra_forbidden":
                    hint = "remove it: readers raise on keys they do not know; keep notes in a file of their own"
                    problems.append(error(where, f"is no key of a compressed-tensors scheme ({item['input']!r})", hint))
                elif not extra:
                    problems.append(error(where, item["msg"], "see the scheme's schema in compressed-tensors"))
            if not extra:
                return None, problems
            for path in extra:
                _drop(entry, path)
        except (NotImplementedError, KeyError, TypeError, AttributeError) as problem:
            return None, [*problems, error(f"config_groups.{key}", f"is not accepted: {problem}", "write it again")]
    return None, problems


def _drop(entry: Any, path: Sequence[Any]) -> None:
    for step in path[:-1]:
        entry = entry[step]
    entry.pop(path[-1], None)


def _container(key: str, scheme: QuantizationScheme, top: Any, found: list[Finding]) -> str | None:
    """Return the container of a group, and report where it is not said as it should be."""
    where = f"config_groups.{key}.format"
    own = scheme.format
    if own is None:
        if not isinstance(top, str) or top == MIXED:
            found.append(
                error(where, f"is missing, and the top-level format is {top!r}", "each group must name its own")
            )
            return None
        hint = "name it at both levels: readers that dequantize while loading look here"
        found.append(warning(where, f"is missing; the top level says {top!r}", hint))
        own = top
    name = str(getattr(own, "value", own))
    if name in REMOVED:
        found.append(error(where, f"is {name!r}, which nothing reads any more", "compress the original again"))
        return None
    if name not in _KNOWN:
        found.append(error(where, f"is {name!r}, no compressed-tensors format", f"one of: {', '.join(sorted(_KNOWN))}"))
        return None
    return name


def _top_level(top: Any, schemes: Any) -> Iterator[Finding]:
    """The top-level format must be that of all groups, or say that they differ."""
    containers = {scheme.container for scheme in schemes if scheme is not None}
    expected = next(iter(containers)) if len(containers) == 1 else MIXED
    if containers and top != expected:
        said = "is missing" if top is None else f"is {top!r}"
        yield error("format", f"{said}, but the groups are {', '.join(sorted(containers))}", f'set it to "{expected}"')


def _patterns(items: Any, where: str, found: list[Finding]) -> Iterator[str]:
    """Yield the entries of a target or ignore list that can be used."""
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        found.append(error(where, "is not a list of strings", "config.json is damaged"))
        return
    for item in items:
        try:
            re.compile(item.removeprefix("re:"))
        except re.error as problem:
            if item.startswith("re:"):
                found.append(error(where, f"{item!r}: {problem}", "fix the pattern"))
                continue
        yield item


def _mixed_targets(groups: Sequence[Group]) -> Iterator[Finding]:
    """Several groups of which one takes whole classes: which one wins is left to the reader."""
    classes = [group.name for group in groups if any(_is_class(target) for target in group.targets)]
    if len(groups) > 1 and classes:
        yield warning(
            f"config_groups.{classes[0]}",
            f"targets a class, beside {len(groups) - 1} other groups: readers differ in which one wins",
            "target modules by name or by pattern in every group",
        )


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()
