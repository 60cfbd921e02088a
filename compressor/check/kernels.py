"""Which kernel would run every kind of layer here, and why the others would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compressor.check.checkpoint import Checkpoint, Module
from compressor.checkpoint.source import DTYPES
from compressor.errors import CompressorError
from compressor.formats.activations import input_format_from
from compressor.inputs import InputOp, rebuild, stored_slots
from compressor.kernels import dispatch
from compressor.kernels.gpu.rounding import kind_of
from compressor.runtime.swap import empty_inputs, empty_packed

ROWS = (1, 512)
"""Rows of activations to ask for: one token at a time, and a prompt."""


@dataclass(frozen=True)
class KernelRow:
    """One kind of layer.

    Attributes:
        pattern: Names of the layers, numbers replaced by `*`.
        count: How many there are.
        format: How they are stored.
        shape: `[out, in]`.
        m: Rows of activations.
        kernel: What would run, or None if nothing here can.
        others: Every other kernel, and why it would not run.
    """

    pattern: str
    count: int
    format: str
    shape: tuple[int, int]
    m: tuple[int, ...]
    kernel: str | None
    others: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def kernel_table(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[KernelRow]:
    """Return the table for activations of `dtype` on `device`, in the order of the layers."""
    counts: dict[tuple[str, str, tuple[int, int], str], list[str]] = {}
    for module in checkpoint.modules.values():
        if module.scheme is not None and module.shape is not None:
            try:
                rounds = kind_of(_inputs(checkpoint, module, dtype))
            except CompressorError:
                rounds = ""  # the row says what is wrong
            key = (pattern_of(module.name), str(module.scheme), module.shape, rounds)
            counts.setdefault(key, []).append(module.name)
    rows = []
    for (pattern, text, shape, _), names in counts.items():
        for m, kernel, others in _answers(checkpoint, names[0], device, dtype):
            rows.append(KernelRow(pattern, len(names), text, shape, m, kernel, others))
    return rows


def pattern_of(name: str) -> str:
    """Return a name with its numbers replaced by `*`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _answers(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, ...], str | None, dict[str, str]]]:
    """Yield rows of activations, the kernel that runs, and the others with their reasons; equal answers once."""
    module = checkpoint.modules[name]
    assert module.scheme is not None
    assert module.shape is not None
    try:
        fmt = module.scheme.format(checkpoint.dtype)
        packed = empty_packed(fmt, module.shape)
        inputs = _inputs(checkpoint, module, dtype)
        found: list[tuple[list[int], str, dict[str, str]]] = []
        for m in ROWS:
            problem = dispatch.linear_problem(packed, fmt, m, dtype, device, inputs)
            kernel = dispatch.pick(problem).name
            reasons = {other: why or f"{kernel} is tried first" for other, why in dispatch.explain(problem)}
            reasons.pop(kernel, None)
            if found and found[-1][1:] == (kernel, reasons):
                found[-1][0].append(m)
            else:
                found.append(([m], kernel, reasons))
    except CompressorError as problem:
        yield ROWS, None, {"compressor.load": problem.message}
        return
    for m_list, kernel, reasons in found:
        yield tuple(m_list), kernel, reasons


def _inputs(checkpoint: Checkpoint, module: Module, dtype: torch.dtype) -> tuple[InputOp, ...]:
    """Return what happens to a module's input: empty tensors, but for small floats, whose split decides."""
    assert module.scheme is not None
    assert module.shape is not None
    stored = module.scheme.inputs
    steps = module.scheme.steps if stored is None else (input_format_from(stored).describe(),)
    if not any(step.get("op") == "float" for step in steps):
        return empty_inputs(steps, module.shape, dtype)
    slots = stored_slots(steps, module.shape, dtype)
    found = {suffix: entry for suffix, entry in module.tensors.items() if suffix in slots}
    right = {
        suffix: entry.name
        for suffix, entry in found.items()
        if (DTYPES.get(entry.dtype), entry.shape) == (slots[suffix].dtype, slots[suffix].shape)
    }
    tensors = checkpoint.read(right.values())
    return rebuild(steps, {suffix: tensors[name] for suffix, name in right.items()})
