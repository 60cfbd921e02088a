"""Formats of native checkpoints: those that compressed-tensors has no name for, described by ours.

A native checkpoint's `config.json` has `model_type: compressor_<base>`, which stock transformers does not know and
raises on. (An unknown `quant_method` alone would only warn, and load random weights.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from compressor.errors import CheckpointError
from compressor.formats import BUILDERS, FIXED_GROUP, GroupSize, get_format
from compressor.formats.activations import ATTENTION_FORMATS, InputFormat
from compressor.formats.base import QuantFormat, group_setting

QUANT_METHOD = "compressor"
MODEL_TYPE_PREFIX = "compressor_"
SCALE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtype of the scales of formats that store them in the checkpoint's dtype; None for the others."""


Steps: TypeAlias = tuple[dict[str, object], ...]
"""What happens to a layer's input, in order, as JSON; see `compressor.inputs.rebuild`."""


@dataclass(frozen=True)
class NativeSchemes:
    """A parsed native `quantization_config`.

    Attributes:
        entries: Name, group size and dtype of scales of each format.
        modules: Module name on disk -> its format.
        inputs: The different treatments of inputs.
        module_inputs: Module name on disk -> its treatment; others have none.
        attention: Attention modules, by name in memory, whose operands are rounded.
        attention_format: What they are rounded to; None without such modules.
    """

    entries: tuple[tuple[str, GroupSize, torch.dtype | None], ...]
    modules: Mapping[str, int]
    inputs: tuple[Steps, ...] = ()
    module_inputs: Mapping[str, int] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    attention_format: InputFormat | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> NativeSchemes:
        """Parse a `quantization_config` object.

        Raises:
            CheckpointError: It is damaged, or newer than this package.
        """
        if config.get("version") != 1:
            raise CheckpointError(
                f"quantization_config: version {config.get('version')!r} of native checkpoints is unknown",
                "upgrade this package",
            )
        entries, modules = config.get("formats"), config.get("modules")
        if not isinstance(entries, list) or not isinstance(modules, Mapping):
            raise CheckpointError("quantization_config: formats or modules are missing", "config.json is damaged")
        parsed = []
        for entry in entries:
            known = isinstance(entry, Mapping) and entry.get("name") in BUILDERS
            size = entry.get("group_size") if known else None
            dtype = entry.get("scale_dtype") if known else None
            if not known or not _is_group_size(entry["name"], size) or dtype not in SCALE_DTYPES:
                raise CheckpointError(f"quantization_config: format {entry!r} is unknown", "upgrade this package")
            parsed.append((str(entry["name"]), size, SCALE_DTYPES[dtype]))
        for module, index in modules.items():
            if not isinstance(index, int) or not 0 <= index < len(parsed):
                raise CheckpointError(f"quantization_config: {module} has format {index!r}", "config.json is damaged")
        return cls(tuple(parsed), dict(modules), *_parse_inputs(config, modules), *_parse_attention(config))

    def find(self, names: Sequence[str], dtype: torch.dtype) -> QuantFormat | None:
        """Return the format of a module, or None if it is dense.

        Args:
            names: Its name on disk, which is what counts here, and perhaps its name in memory.
            dtype: Dtype of integer formats' scales.
        """
        index = self.modules.get(names[0])
        if index is None:
            return None
        name, group_size, stored = self.entries[index]
        return get_format(name, group_size, stored or dtype)

    def steps(self, names: Sequence[str]) -> Steps:
        """Return what happens to the input of a packed module, in order, as JSON; `names` as for `find`."""
        index = self.module_inputs.get(names[0])
        return () if index is None else self.inputs[index]


def _parse_inputs(config: Mapping[str, Any], modules: Mapping[str, int]) -> tuple[tuple[Steps, ...], dict[str, int]]:
    """Return the treatments of inputs and which module has which; older configs have neither.

    Raises:
        CheckpointError: They are damaged.
    """
    lists, owners = config.get("inputs", []), config.get("module_inputs", {})
    sound = isinstance(lists, list) and isinstance(owners, Mapping)
    sound = sound and all(isinstance(steps, list) and all(isinstance(s, Mapping) for s in steps) for steps in lists)
    if not sound:
        raise CheckpointError("quantization_config: inputs or module_inputs are damaged", "config.json is damaged")
    for module, index in owners.items():
        if module not in modules or not isinstance(index, int) or not 0 <= index < len(lists):
            raise CheckpointError(f"quantization_config: {module} has inputs {index!r}", "config.json is damaged")
    return tuple(tuple(dict(step) for step in steps) for steps in lists), dict(owners)


def _parse_attention(config: Mapping[str, Any]) -> tuple[tuple[str, ...], InputFormat | None]:
    """Return which attention modules round their operands, and to what; most configs have none.

    Raises:
        CheckpointError: The entry is damaged, or newer than this package.
    """
    entry = config.get("attention")
    if entry is None:
        return (), None
    known = isinstance(entry, Mapping) and ATTENTION_FORMATS.get(str(entry.get("format")))
    modules = entry.get("modules") if isinstance(entry, Mapping) else None
    if not known or not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise CheckpointError(f"quantization_config: attention {entry!r} is unknown", "upgrade this package")
    return tuple(modules), known


def native_entry(fmt: QuantFormat) -> dict[str, Any]:
    """Return the JSON a native config names a format by."""
    dtype = getattr(fmt, "dtype", None)
    stored = next(name for name, known in SCALE_DTYPES.items() if known == dtype)
    return {"name": fmt.name, "group_size": group_setting(fmt), "scale_dtype": stored}


def _is_group_size(name: str, size: Any) -> bool:
    """Return whether a format can have this group size."""
    if size == "tensor":
        return name not in FIXED_GROUP
    return size is None or (isinstance(size, int) and size > 0)
