"""Reading a compressed-tensors config: which format each module is stored in.

The container is described by `quantization_config` in config.json: groups of modules with one scheme each, chosen by
targets and an ignore list. Anything we could only run by leaving something out (an unknown scheme of inputs or of the
KV cache, quantized outputs, transforms, sparsity) is refused here: scores of such a run would be another model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.activations import InputFormat, input_format_from
from compressor.formats.base import QuantFormat
from compressor.formats.fp8 import BLOCK, FP8, Granularity
from compressor.formats.int_bytes import IntBytes
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.nvfp4 import NVFP4

KV_SCHEME: dict[str, object] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
"""The `kv_cache_scheme` this package writes and runs: FP8, one static scale per layer for keys and one for values."""

_REFUSED = ("sparsity_config", "transform_config", "moe_sparsity_config")
_MIXED = "mixed-precision"
_LINEAR = ("Linear", "Module")
"""Class names of everything that is stored packed; experts are no modules in memory, but linear layers on disk."""


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`.

    Attributes:
        name: Its key, e.g. `group_0`.
        targets: Module names, `re:` patterns or class names.
        container: compressed-tensors format name, e.g. `pack-quantized`.
        weights: The `weights` arguments.
        inputs: How the inputs are rounded, or None.
    """

    name: str
    targets: tuple[str, ...]
    container: str
    weights: Mapping[str, Any]
    inputs: InputFormat | None = None

    def build(self, dtype: torch.dtype) -> QuantFormat:
        """Return the format object; see `format_from_scheme`."""
        return format_from_scheme(dict(self.weights), self.container, dtype)


@dataclass(frozen=True)
class Schemes:
    """A parsed `quantization_config`."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv_cache: bool = False

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Schemes:
        """Parse a `quantization_config` object.

        Raises:
            CheckpointError: Not a complete compressed-tensors config, or not in compressed state.
            UnsupportedError: It asks for something this package does not run.
        """
        method, status = config.get("quant_method"), config.get("quantization_status")
        if method != "compressed-tensors":
            raise CheckpointError(
                f"quantization_config: quant_method is {method!r}, not 'compressed-tensors'",
                "load it with the package that wrote it, or start from the original checkpoint",
            )
        if status != "compressed":
            raise CheckpointError(
                f"quantization_config: quantization_status is {status!r}, not 'compressed'",
                "its weights would load as random numbers elsewhere; write the checkpoint again",
            )
        for key in _REFUSED:
            if config.get(key):
                raise UnsupportedError(f"quantization_config: {key} is set to {config[key]!r}", "it cannot be run here")
        cache = config.get("kv_cache_scheme")
        if cache and {key: cache.get(key) for key in KV_SCHEME} != KV_SCHEME:
            raise UnsupportedError(
                f"quantization_config: kv_cache_scheme {cache!r} cannot be run here", "it is not ours"
            )
        entries = config.get("config_groups")
        if not isinstance(entries, Mapping) or not entries:
            raise CheckpointError("quantization_config: config_groups is missing or empty", "config.json is damaged")
        default = config.get("format")
        groups = tuple(_group(str(name), entry, default) for name, entry in entries.items())
        return cls(groups, _strings(config.get("ignore"), "ignore"), bool(cache))

    def group_of(self, module: str, classes: Iterable[str]) -> Group | None:
        """Return the group a module belongs to, or None if no target matches or the ignore list does.

        Exact names win over patterns, patterns over class names; among equals the first group wins.

        Args:
            module: Full name as in the checkpoint.
            classes: Names of its class and base classes.
        """
        known = tuple(classes)
        if any(_rank(entry, module, known) is not None for entry in self.ignore):
            return None
        best: tuple[int, Group] | None = None
        for group in self.groups:
            for target in group.targets:
                rank = _rank(target, module, known)
                if rank is not None and (best is None or rank < best[0]):
                    best = rank, group
        return best[1] if best else None

    def find(self, names: Sequence[str], dtype: torch.dtype) -> QuantFormat | None:
        """Return the format of a packed module, or None if no group takes it.

        Args:
            names: Its name on disk, and its name in memory where that is known: configs use either.
            dtype: Dtype of integer formats' scales.

        Raises:
            UnsupportedError: A scheme that is not supported.
        """
        group = self._group(names)
        return group.build(dtype) if group else None

    def steps(self, names: Sequence[str]) -> tuple[dict[str, object], ...]:
        """Return what happens to the input of a packed module, in order, as JSON; `names` as for `find`."""
        group = self._group(names)
        return (group.inputs.describe(),) if group and group.inputs else ()

    def _group(self, names: Sequence[str]) -> Group | None:
        groups = (self.group_of(name, _LINEAR) for name in names)
        return next((entry for entry in groups if entry), None)


def format_from_scheme(scheme: Mapping[str, Any], container: str, dtype: torch.dtype) -> QuantFormat:
    """Return the format that reads weights stored under this scheme.

    Args:
        scheme: compressed-tensors `weights` arguments; left-out keys have that library's defaults.
        container: compressed-tensors format name.
        dtype: Dtype of integer and FP8 formats' scales (the dtype of the model: readers cast scales to it).

    Raises:
        UnsupportedError: No format of ours reads it; the message says which argument is the reason.
    """
    bits, kind = scheme.get("num_bits", 8), scheme.get("type", "int")
    strategy, size = scheme.get("strategy"), scheme.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    symmetric = bool(scheme.get("symmetric", True))
    if not symmetric and container != "pack-quantized":
        raise _unsupported(container, "symmetric", False)
    if scheme.get("dynamic", False):
        raise _unsupported(container, "dynamic", scheme["dynamic"])
    # "weight" is an order in which codes were chosen; what is stored is the same. (The other orders were removed.)
    if scheme.get("actorder") not in (None, False, "weight", "static"):
        raise _unsupported(container, "actorder", scheme["actorder"])
    if container == "pack-quantized":
        if kind != "int" or bits not in range(2, 9):
            raise _unsupported(container, "num_bits, type", (bits, kind))
        if not symmetric and scheme.get("zp_dtype") not in (None, "torch.int8"):
            raise _unsupported(container, "zp_dtype", scheme["zp_dtype"])
        if strategy in ("channel", "tensor"):
            return IntFormat(bits, None, dtype, symmetric, per_tensor=strategy == "tensor")
        if strategy == "group" and isinstance(size, int) and size > 0:
            return IntFormat(bits, size, dtype, symmetric)
        raise _unsupported(container, "strategy, group_size", (strategy, size))
    if container == "int-quantized":
        if (bits, kind) != (8, "int") or strategy not in ("channel", "tensor"):
            raise _unsupported(container, "num_bits, type, strategy", (bits, kind, strategy))
        return IntBytes(None, dtype, per_tensor=strategy == "tensor")
    if container == "float-quantized":
        if (bits, kind) != (8, "float"):
            raise _unsupported(container, "num_bits, type", (bits, kind))
        return FP8(_granularity(container, strategy, scheme.get("block_structure")), dtype)
    fixed: dict[str, tuple[str, QuantFormat]] = {
        "nvfp4-pack-quantized": ("tensor_group", NVFP4()),
        "mxfp4-pack-quantized": ("group", MXFP4()),
        "mxfp8-quantized": ("group", MXFP8()),
    }
    if container not in fixed:
        raise UnsupportedError(
            f"compressed-tensors format {container!r} is not supported",
            f"supported are: pack-quantized, int-quantized, float-quantized, {', '.join(fixed)}",
        )
    expected, fmt = fixed[container]
    if (bits, kind, strategy, size) != (fmt.bits, "float", expected, fmt.group_size):
        raise _unsupported(container, "num_bits, type, strategy, group_size", (bits, kind, strategy, size))
    return fmt


def _granularity(container: str, strategy: str, block: Any) -> Granularity:
    """Return what shares one FP8 scale."""
    if strategy == "tensor":
        return "tensor"
    if strategy == "channel":
        return "channel"
    if strategy == "block" and isinstance(block, list | tuple) and list(block) == [BLOCK, BLOCK]:
        return "block"
    raise _unsupported(container, "strategy, block_structure", (strategy, block))


def _unsupported(container: str, key: str, value: object) -> UnsupportedError:
    return UnsupportedError(f"{container} with {key} = {value!r} is not supported", "use another reader for this one")


def _group(name: str, entry: Any, default: Any) -> Group:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("weights"), Mapping):
        raise CheckpointError(f"config_groups.{name}: has no weights scheme", "config.json is damaged")
    if entry.get("output_activations") is not None:
        raise UnsupportedError(
            f"config_groups.{name}: output_activations are quantized, which is not simulated here",
            "a score without it would be that of another model; use another checkpoint",
        )
    inputs = entry.get("input_activations")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise CheckpointError(f"config_groups.{name}: input_activations is {inputs!r}", "config.json is damaged")
    container = entry.get("format") or default
    if not isinstance(container, str) or container == _MIXED:
        raise CheckpointError(f"config_groups.{name}: format is {container!r}", "each group must name its format")
    targets = _strings(entry.get("targets"), f"config_groups.{name}.targets")
    return Group(name, targets, container, entry["weights"], None if inputs is None else input_format_from(inputs))


def _strings(value: Any, where: str) -> tuple[str, ...]:
    items: Sequence[Any] = [] if value is None else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise CheckpointError(f"quantization_config: {where} is not a list of strings", "config.json is damaged")
    for item in items:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise CheckpointError(f"quantization_config: {where}: {item!r}: {error}", "fix the pattern") from None
    return tuple(items)


def _rank(target: str, module: str, classes: tuple[str, ...]) -> int | None:
    """Return 0 for an exact name, 1 for a pattern, 2 for a class name, None for no match."""
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    if target == module:
        return 0
    return 2 if target in classes else None
