"""A checkpoint's packed weights as they lie on disk, read without building a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.checkpoint.source import DTYPES, Source, fits, read_headers, read_json
from compressor.errors import CheckpointError
from compressor.formats.activations import GLOBAL_SCALE, SCALE
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.native import QUANT_METHOD, NativeSchemes
from compressor.formats.schemes import Schemes
from compressor.inputs import InputOp, rebuild, stored_slots

PACKED = ".weight_packed"

_CODES = ("F8_E4M3", "I8")
"""Dtypes of codes that fill whole bytes: they are stored as `weight`, and a `weight_scale` beside it tells."""

AnySchemes: TypeAlias = Schemes | NativeSchemes
"""How a config says which module is stored in which format."""


class KeyMismatch(CheckpointError):
    """The checkpoint lacks tensors the model needs, or has ones it has no place for.

    Attributes:
        missing: Names in the model.
        unexpected: Names on disk.
    """

    def __init__(self, path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        self.missing, self.unexpected = tuple(sorted(missing)), tuple(sorted(unexpected))
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in (("missing", self.missing), ("unexpected", self.unexpected))
            if names
        ]
        super().__init__(f"{path}: tensors {'; '.join(parts)}", "does config.json belong to these weights?")


def open_checkpoint(path: Path) -> tuple[Source, AnySchemes | None]:
    """Read config and headers of a dense or compressed checkpoint; the second value is None for a dense one.

    Raises:
        CheckpointError: Missing, unreadable or inconsistent files, or a quantization that is not ours to read.
        UnsupportedError: A compressed-tensors scheme that is not supported.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", "give a checkpoint folder")
    config = read_json(path / "config.json")
    tensors = read_headers(path)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config is not an object", "config.json is damaged")
    if quantization is not None and quantization.get("quant_method") in ("fp8", "mxfp4"):
        return Source.open(path), None  # these have no packed form here: decoded as they are read
    schemes: AnySchemes | None = None
    if quantization is not None:
        native = quantization.get("quant_method") == QUANT_METHOD
        schemes = NativeSchemes.parse(quantization) if native else Schemes.parse(quantization)
    return Source(path, str(path), None, config, tensors), schemes


def dequantized(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint by its name on disk, packed weights decoded to float32 `<module>.weight`.

    Other floating-point tensors are widened to float32, integers stay as they are. Reads one module at a time.

    Raises:
        CheckpointError: As `load`.
        UnsupportedError: As `load`.
    """
    source, schemes = open_checkpoint(Path(path))
    modules = set(packed_modules(source))
    for name in source.tensors:
        module, _, suffix = name.rpartition(".")
        if owned_suffix(suffix) and module in modules:
            if name != codes_name(source, module):
                continue
            fmt, packed = read_packed(source, schemes, module)
            yield f"{module}.weight", fmt.decode(*fmt.unpack(packed))
        else:
            tensor = source.read([name])[name]
            yield name, tensor.float() if tensor.is_floating_point() else tensor


def read_packed(source: Source, schemes: AnySchemes | None, module: str) -> tuple[QuantFormat, PackedTensor]:
    """Read one packed weight from disk alone, without a model.

    Raises:
        CheckpointError: It is damaged, or the config says nothing about it.
        UnsupportedError: A scheme that is not supported.
    """
    fmt = format_of((module,), schemes, _scale_dtype(source, module))
    shape = _stored_shape(source, module, fmt)
    check_stored(source, module, fmt, shape)
    tensors = source.read(f"{module}.{suffix}" for suffix in fmt.layout(shape))
    return fmt, assemble(module, fmt, shape, tensors)


def packed_modules(source: Source) -> frozenset[str]:
    """Return the names on disk of the modules with packed weights.

    Those are modules with a `weight_packed`, and those whose `weight` is of one-byte codes: in a checkpoint that says
    it is quantized any such one (so that a missing scale is noticed), elsewhere if a scale is stored beside it.

    Raises:
        CheckpointError: A packed weight has a dense one beside it.
    """
    modules = frozenset(name.removesuffix(PACKED) for name in source.tensors if name.endswith(PACKED))
    for module in sorted(modules):
        if f"{module}.weight" in source.tensors:
            raise CheckpointError(f"{module}: has both weight and weight_packed", "one must go: which is meant?")
    quantized = "quantization_config" in source.config
    codes = (name for name, info in source.tensors.items() if name.endswith(".weight") and info.dtype in _CODES)
    return modules | {name.removesuffix(".weight") for name in codes if quantized or f"{name}_scale" in source.tensors}


def owned_suffix(suffix: str) -> bool:
    """Return whether a packed module's tensor may end in this: codes, scales, and what its input goes through."""
    return suffix == "weight" or suffix.startswith(("weight_", "input_"))


def codes_name(source: Source, module: str) -> str:
    """Return the name of the tensor that holds a packed module's codes."""
    return module + PACKED if module + PACKED in source.tensors else f"{module}.weight"


def format_of(names: Sequence[str], schemes: AnySchemes | None, dtype: torch.dtype) -> QuantFormat:
    """Return the format a packed module is stored in.

    Args:
        names: Its name on disk, and its name in memory where that is known: configs use either.
        schemes: The parsed config.
        dtype: Dtype of integer formats' scales.

    Raises:
        CheckpointError: The config assigns none to it.
        UnsupportedError: One that is not supported.
    """
    fmt = schemes.find(names, dtype) if schemes else None
    if fmt is None:
        raise CheckpointError(
            f"{names[0]}: is stored packed, but quantization_config assigns it no scheme", "config.json is incomplete"
        )
    return fmt


def check_stored(
    source: Source, module: str, fmt: QuantFormat, shape: tuple[int, int], steps: Sequence[dict[str, object]] = ()
) -> None:
    """Check dtypes and shapes of a packed module's tensors; integer formats' scales may have any float dtype.

    Args:
        source: The checkpoint.
        module: Name on disk.
        fmt: Its format.
        shape: `[out, in]`.
        steps: What happens to its input.

    Raises:
        CheckpointError: A tensor is missing or not what the format stores for a matrix of this shape.
    """
    if reason := fmt.refuse(shape):
        raise CheckpointError(f"{module}: {fmt.name}: {reason}", "does config.json belong to these weights?")
    for suffix, slot in {**fmt.layout(shape), **stored_slots(steps, shape, torch.float32)}.items():
        name = f"{module}.{suffix}"
        if name not in source.tensors:
            raise KeyMismatch(source.path, [name], [])
        info = source.tensors[name]
        if not fits(info, slot):
            raise CheckpointError(
                f"{name}: is {info.dtype} {list(info.shape)}, but {fmt.name} of a {list(shape)} matrix needs "
                f"{slot.dtype} {list(slot.shape)}",
                "does config.json belong to these weights?",
            )


def assemble(module: str, fmt: QuantFormat, shape: tuple[int, int], tensors: dict[str, Tensor]) -> PackedTensor:
    """Assemble a packed weight; scales take the dtype the format expects, as other readers cast them too.

    Raises:
        CheckpointError: A scale is not finite, a divisor not positive, or the stored shape is another one.
    """
    out = {}
    for suffix, slot in fmt.layout(shape).items():
        name = f"{module}.{suffix}"
        tensor = tensors[name].to(slot.dtype)
        if bad := _bad_scales(suffix, tensor):
            raise CheckpointError(
                f"{name}: {bad} of {tensor.numel()} values are NaN, Inf or no scale", "the checkpoint is damaged"
            )
        if suffix == "weight_shape" and tuple(tensor.tolist()) != shape:
            raise CheckpointError(
                f"{name}: is {tensor.tolist()}, but the model needs {list(shape)}", "does config.json belong to it?"
            )
        out[suffix] = tensor
    return PackedTensor(fmt.name, shape, out)


def assemble_inputs(
    module: str,
    steps: Sequence[dict[str, object]],
    shape: tuple[int, int],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> tuple[InputOp, ...]:
    """Rebuild what happens to a module's input; static scales take the dtype of the model, as other readers cast them.

    Raises:
        CheckpointError: A value is not finite, or a scale not positive.
    """
    out = {}
    for suffix, slot in stored_slots(steps, shape, dtype).items():
        name = f"{module}.{suffix}"
        tensor = tensors[name].to(slot.dtype)
        sound = not tensor.is_floating_point() or torch.isfinite(tensor).all()
        if not sound or (suffix in (SCALE, GLOBAL_SCALE) and not (tensor > 0).all()):
            raise CheckpointError(f"{name}: has values that are NaN, Inf or no scale", "the checkpoint is damaged")
        out[suffix] = tensor
    return rebuild(steps, out)


def _bad_scales(suffix: str, tensor: Tensor) -> int:
    """Count values that would make weights NaN or Inf."""
    if tensor.is_floating_point():
        values = tensor.float()
        allowed = torch.isfinite(values)
        if suffix == "weight_global_scale":  # a divisor
            allowed &= values > 0
        return int((~allowed).sum())
    # E8M0 bytes are bare exponents, with one code for NaN.
    return int((tensor == 255).sum()) if suffix == "weight_scale" else 0


def _scale_dtype(source: Source, module: str) -> torch.dtype:
    """Return the dtype a module's scales are stored in."""
    info = source.tensors.get(f"{module}.weight_scale")
    dtype = DTYPES[info.dtype] if info else torch.float32
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _stored_shape(source: Source, module: str, fmt: QuantFormat) -> tuple[int, int]:
    """Return `[out, in]` of a packed weight from disk alone."""
    name = f"{module}.weight_shape"
    if name in source.tensors:
        if source.tensors[name].shape != (2,):
            raise CheckpointError(
                f"{name}: has shape {list(source.tensors[name].shape)}, not [2]", "the file is damaged"
            )
        rows, columns = source.read([name])[name].tolist()
        return rows, columns
    info = source.tensors[codes_name(source, module)]
    if len(info.shape) != 2:
        raise CheckpointError(f"{info.name}: is {list(info.shape)}, no matrix", "the file is damaged")
    return info.shape[0], info.shape[1] * 8 * DTYPES[info.dtype].itemsize // fmt.bits
