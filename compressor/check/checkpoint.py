"""A checkpoint as the checks see it: headers, config and what the model needs, read leniently and only once.

Nothing here raises because something is wrong inside: what can be read is shown, and what cannot is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.check.finding import Finding, Reader
from compressor.check.groups import Groups, read_groups, read_native
from compressor.check.model import Model, build_model
from compressor.check.scheme import NATIVE, Scheme
from compressor.checkpoint.source import DTYPES, TensorInfo, read_json
from compressor.errors import CheckpointError, CompressorError
from compressor.formats.native import QUANT_METHOD
from compressor.output import REPORT

if TYPE_CHECKING:
    from compressor.check.values import DenseFacts, Facts

CONTAINER = "compressed-tensors"
DENSE = "dense"
SUFFIXES = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape", "weight_g_idx"),
        *("weight_codebook", "weight_exponent", "weight_mantissa"),
        *("input_scale", "input_zero_point", "input_global_scale"),
        *("input_shift", "input_shift_carry", "input_factor", "input_mantissa", "input_pow2", "input_exponent"),
        *("input_order", "input_rotation", "input_rotation_2"),
        *("output_scale", "output_zero_point"),
    }
)
"""Last names of tensors that belong to a quantized module."""


@dataclass(frozen=True)
class Module:
    """One quantized module on disk.

    Attributes:
        name: Name on disk.
        tensors: Suffix -> header entry, whatever is there.
        group: Key of the config group that takes it, or None.
        scheme: How it is stored; None if no group takes it or the group cannot be understood.
        shape: `[out, in]`, from the model where that is known; None if nothing tells.
        written: What `weight_shape` says, or None.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    group: str | None
    scheme: Scheme | None
    shape: tuple[int, int] | None
    written: tuple[int, int] | None = None

    @property
    def codes(self) -> TensorInfo | None:
        """The tensor that holds the codes, if it is there."""
        return self.tensors.get("weight_packed") or self.tensors.get("weight")


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: The folder.
        config: Parsed `config.json`.
        tensors: Every tensor in every readable shard, by name; of a name stored twice, the first.
        files: Shard -> names of the tensors in it.
        metadata: Shard -> metadata of its header.
        damaged: What could not be read.
        reader: The program it is checked for, or None for any.
        trust_remote_code: Whether model code that comes with it may run.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, tuple[TensorInfo, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    damaged: tuple[Finding, ...]
    reader: Reader | None = None
    trust_remote_code: bool = False

    @cached_property
    def section(self) -> Mapping[str, Any] | None:
        """The `quantization_config`, or None."""
        return self.config.get("quantization_config")

    @property
    def container(self) -> str:
        """How it is stored: `compressed-tensors`, `native` or `dense`."""
        if self.section is None:
            return DENSE
        return NATIVE if self.section.get("quant_method") == QUANT_METHOD else CONTAINER

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype the config names, or that of most dense tensors."""
        for holder in (self.config, self.config.get("text_config")):
            name = holder.get("dtype", holder.get("torch_dtype")) if isinstance(holder, Mapping) else None
            found = getattr(torch, name, None) if isinstance(name, str) else None
            if isinstance(found, torch.dtype):
                return found
        sizes: dict[torch.dtype, int] = {}
        for entry in self.tensors.values():
            if entry.dtype in ("F32", "F16", "BF16"):
                sizes[DTYPES[entry.dtype]] = sizes.get(DTYPES[entry.dtype], 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)

    @cached_property
    def groups(self) -> Groups | None:
        """What the config says about quantization; None for a dense checkpoint.

        Raises:
            CheckpointError: A native config that cannot be read.
        """
        if self.section is None:
            return None
        return read_native(self.section, self.dtype) if self.container == NATIVE else read_groups(self.section)

    @cached_property
    def model(self) -> Model | CompressorError:
        """What the model needs, or why it could not be built."""
        rows = {name: (entry.shape[0], 1) for name, entry in self._codes.items() if len(entry.shape) == 2}
        dense = {name: entry.shape for name, entry in self.tensors.items() if self.owner(name) is None}
        try:
            return build_model(self.path, {**dense, **rows}, self.trust_remote_code)
        except CompressorError as problem:
            return problem

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every quantized module on disk, by name."""
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, entry in self.tensors.items():
            if (owner := self.owner(name)) is not None:
                parts.setdefault(owner, {})[name.rpartition(".")[2]] = entry
        shapes = self._written_shapes(parts)
        return {name: self._module(name, tensors, shapes.get(name)) for name, tensors in parts.items()}

    @cached_property
    def packed_facts(self) -> Mapping[str, Facts]:
        """What the numbers of every quantized module are like; reads all of them, a batch at a time."""
        from compressor.check.values import packed_facts

        return dict(packed_facts(self))

    @cached_property
    def dense_facts(self) -> Mapping[str, DenseFacts]:
        """The same for every dense floating-point tensor."""
        from compressor.check.values import dense_facts

        return dict(dense_facts(self))

    @cached_property
    def report(self) -> Mapping[str, Any] | None:
        """The report of the run that wrote it, if it is one of ours.

        Raises:
            CheckpointError: It is there but unreadable.
        """
        return read_json(self.path / REPORT) if (self.path / REPORT).is_file() else None

    def owner(self, tensor: str) -> str | None:
        """Return the quantized module a tensor belongs to, or None for a dense one."""
        module, _, suffix = tensor.rpartition(".")
        return module if module in self._quantized and (suffix in SUFFIXES or suffix == "weight") else None

    def names_of(self, module: str) -> tuple[str, ...]:
        """Return the names configs may call a module by: on disk, and in memory where that is known."""
        if isinstance(self.model, CompressorError):
            return (module,)
        target = self.model.targets.get(f"{module}.weight")
        memory = None if target is None or target.param is None else target.param.removesuffix(".weight")
        return (module,) if memory in (None, module) else (module, str(memory))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they lie on disk, without looking at their values.

        Raises:
            CheckpointError: One cannot be read.
        """
        out: dict[str, Tensor] = {}
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for name in names:
                file = self.tensors[name].file
                try:
                    if file not in handles:
                        handles[file] = stack.enter_context(safe_open(self.path / file, framework="pt"))
                    out[name] = handles[file].get_tensor(name).clone()  # our own memory: the file's can be given back
                except (OSError, SafetensorError) as problem:
                    raise CheckpointError(f"{file}: cannot read {name}: {problem}", "download it again") from problem
        return out

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Names of the modules that have any tensor only quantized modules have."""
        owners: set[str] = set()
        for name, entry in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            one_byte = suffix == "weight" and self.section is not None and entry.dtype in ("I8", "F8_E4M3")
            if suffix in SUFFIXES or one_byte:
                owners.add(module)
        return frozenset(owners)

    @property
    def _codes(self) -> dict[str, TensorInfo]:
        """Dense weight name -> the tensor that stands for it."""
        found = {}
        for module in self._quantized:
            entry = self.tensors.get(f"{module}.weight_packed") or self.tensors.get(f"{module}.weight")
            if entry is not None:
                found[f"{module}.weight"] = entry
        return found

    def _written_shapes(self, parts: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, tuple[int, int]]:
        """Read `weight_shape` wherever it is what it should be."""
        names = [
            entry.name
            for tensors in parts.values()
            if (entry := tensors.get("weight_shape")) is not None and (entry.dtype, entry.shape) == ("I64", (2,))
        ]
        return {
            name.removesuffix(".weight_shape"): (int(value[0]), int(value[1]))
            for name, value in self.read(names).items()
        }

    def _module(self, name: str, tensors: Mapping[str, TensorInfo], written: tuple[int, int] | None) -> Module:
        classes = ("Linear", "Module")
        group = self.groups.group_of(self.names_of(name), classes) if self.groups else None
        scheme = self.groups.schemes.get(group) if self.groups and group else None
        shape = self._needed_shape(name) or written
        if shape is None and scheme is not None:
            shape = _shape_of_codes(tensors, scheme)
        return Module(name, tensors, group, scheme, shape, written)

    def _needed_shape(self, module: str) -> tuple[int, int] | None:
        """Return `[out, in]` of the place in the model a module fills."""
        return None if isinstance(self.model, CompressorError) else self.model.shape_of(f"{module}.weight")


def _shape_of_codes(tensors: Mapping[str, TensorInfo], scheme: Scheme) -> tuple[int, int] | None:
    """Return `[out, in]` from the codes alone, where no bits are left over."""
    packed = tensors.get("weight_packed")
    entry = packed or tensors.get("weight")
    if entry is None or len(entry.shape) != 2:
        return None
    bits = scheme.bits if scheme.container != NATIVE else 4
    per_item = 8 * DTYPES[entry.dtype].itemsize / bits if packed else 1
    return entry.shape[0], int(entry.shape[1] * per_item)
