"""Checkpoints that are quantized already, shown as the dense checkpoints they stand for.

Read are compressed-tensors containers in every format of this package, block FP8 as DeepSeek-V3 introduced it (arXiv
2412.19437, section 3.3): `weight` in FP8 times `weight_scale_inv`, which is a multiplier per block of rows and columns
despite its name, and the MXFP4 stacks of experts of GPT-OSS. Everything else is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.cuts import CUTS
from compressor.checkpoint.mxfp4_stacks import MXFP4Stack, mxfp4_stacks
from compressor.checkpoint.source import DTYPE_NAMES, DTYPES, FLOATS, Source, TensorInfo, fits
from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.native import QUANT_METHOD
from compressor.formats.schemes import Schemes

_ORIGINAL = "start from the full-precision checkpoint it was made from"
_REFUSED: dict[str, str] = {
    "gptq": f"GPTQ packs codes transposed and in an order of its own; {_ORIGINAL}",
    "awq": f"AWQ packs codes in an order of its own; {_ORIGINAL}",
    "bitsandbytes": f"its packing is known to bitsandbytes alone; {_ORIGINAL}",
    "compressor": "start from the model that its compress_recipe.json names",
}

_DECODED = ("compressed-tensors", "fp8", "mxfp4")
"""Quantizations that are undone here."""

_FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATION_LEAVES = frozenset(
    f"{what}{leaf}"
    for what in ("input", "output", "activation", "k", "v", "q")
    for leaf in ("_scale", "_zero_point", "_global_scale")
)
"""Tensors of a quantization of activations or of the KV cache; a dense checkpoint has no use for them."""


@dataclass(frozen=True)
class PackedDecoder:
    """Decodes one matrix of a compressed-tensors container, or of a native one.

    Attributes:
        module: Name on disk.
        fmt: How it is packed.
        shape: Of the matrix, `[out, in]`.
        window: What follows the filters in the weight's own shape; None for a matrix.
        index: Of a stack; there are none.
    """

    module: str
    fmt: QuantFormat
    shape: tuple[int, int]
    window: tuple[int, ...] | None = None
    index: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        return tuple(f"{self.module}.{suffix}" for suffix in self.fmt.layout(self.shape))

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return `[out, in]`, or `[out, *window]`, float32.

        Raises:
            CheckpointError: A tensor is not what the format stores for this shape.
        """
        stored = {}
        for suffix, slot in self.fmt.layout(self.shape).items():
            tensor = tensors[f"{self.module}.{suffix}"]
            stored[suffix] = tensor.to(slot.dtype) if tensor.dtype in FLOATS and slot.dtype in FLOATS else tensor
        try:
            matrix = self.fmt.decode(*self.fmt.unpack(PackedTensor(self.fmt.name, self.shape, stored)))
            return matrix if self.window is None else matrix.reshape(len(matrix), *self.window)
        except CheckpointError as error:
            raise CheckpointError(f"{self.module}: {error.message}", error.hint) from error


@dataclass(frozen=True)
class BlockDecoder:
    """Decodes one matrix stored as FP8 with a scale per block of rows and columns.

    Attributes:
        weight: Name of the FP8 tensor.
        scale: Name of the multipliers: `[ceil(out/rows), ceil(in/columns)]`, or one for the whole matrix.
        block: Rows and columns of a block; None for one scale.
        index: Of a stack; there are none.
    """

    weight: str
    scale: str
    block: tuple[int, int] | None
    index: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names on disk."""
        return self.weight, self.scale

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return `[out, in]` float32; the last row and column of blocks may be cut off by the matrix's edge."""
        weight, scale = tensors[self.weight].float(), tensors[self.scale].float()
        if self.block is None:
            return weight.mul_(scale.reshape(()))
        for dim, size in enumerate(self.block):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(scale)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization section of a config, its text model's included, or None for a dense checkpoint."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key):
                    found = holder[key]
                    return found if isinstance(found, Mapping) else {"quant_method": type(found).__name__}
    return None


def refuse_quantized(config: Mapping[str, Any], where: object) -> None:
    """Refuse a checkpoint whose quantization cannot be undone here; needs its config alone.

    Raises:
        UnsupportedError: Names the method and says what to do.
    """
    section = quantization_of(config)
    if section is None or section.get("quant_method") in _DECODED or _only_cut(section):
        return
    method = str(section.get("quant_method", "unknown"))
    raise UnsupportedError(
        f"{where}: is quantized already (quant_method {method!r}) in a way that is not decoded here",
        _REFUSED.get(method, _ORIGINAL),
    )


def _only_cut(section: Mapping[str, Any]) -> bool:
    """Return whether a native config packs nothing: the model has fewer channels, its weights are dense."""
    return section.get("quant_method") == QUANT_METHOD and CUTS in section and not section.get("modules")


def dequantizing(source: Source) -> Source:
    """Return a source that reads dense; a dense checkpoint comes back as it is.

    Raises:
        CheckpointError: Config and tensors do not belong together.
        UnsupportedError: A quantization that is not decoded here.
    """
    section = quantization_of(source.config)
    if section is None or _only_cut(section):
        return source
    refuse_quantized(source.config, source.path)
    method = section["quant_method"]
    made: Made
    if method == "mxfp4":
        made = {name: (shape, stack, "MXFP4") for name, (shape, stack) in mxfp4_stacks(source).items()}
    else:
        made = _block_fp8(source, section) if method == "fp8" else _compressed_tensors(source, section)
    if not made:
        raise CheckpointError(
            f"{source.path}: config.json says quant_method {method!r}, but no tensor is stored that way",
            "remove quantization_config if the weights are dense",
        )
    parts = {part for _, decoder, _ in made.values() for part in decoder.parts}
    gone = {name for name in source.tensors if name.rpartition(".")[2] in _ACTIVATION_LEAVES} - parts
    if left := sorted(n for n in source.tensors.keys() - parts if source.tensors[n].dtype in _FP8):
        raise CheckpointError(f"{left[0]}: is stored in FP8 without a scale", "the checkpoint is incomplete")
    dtype = _dense_dtype(source, parts)
    tensors = {name: info for name, info in source.tensors.items() if name not in parts and name not in gone}
    for name, (shape, decoder, _) in made.items():
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        tensors[name] = TensorInfo(name, dtype, shape, nbytes, source.tensors[decoder.parts[0]].file)
    return replace(
        source,
        config=_without_quantization(source.config),
        tensors=tensors,
        stored=source.tensors,
        decoders={name: decoder for name, (_, decoder, _) in made.items()},
        notes=(*source.notes, *_notes(Counter(what for *_, what in made.values()), method, dtype, len(gone))),
    )


Made = dict[str, tuple[tuple[int, ...], "PackedDecoder | BlockDecoder | MXFP4Stack", str]]
"""Name of a dense tensor -> shape, how it is made, and the format it is stored in, in words."""


def _block_fp8(source: Source, section: Mapping[str, Any]) -> Made:
    """Find the matrices of a block FP8 checkpoint."""
    size = section.get("weight_block_size")
    if size is not None and not (isinstance(size, list | tuple) and len(size) == 2 and min(size) > 0):
        raise CheckpointError(f"{source.path}: weight_block_size is {size!r}, not two sizes", "config.json is damaged")
    made: Made = {}
    for name, info in source.tensors.items():
        scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in source.tensors), None)
        if info.dtype not in _FP8 or scale is None:
            continue
        if len(info.shape) != 2:
            raise UnsupportedError(f"{name}: {len(info.shape)}-D FP8 tensor {list(info.shape)}", _ORIGINAL)
        block = None
        if math.prod(source.tensors[scale].shape) != 1 or size is not None:
            if size is None:
                raise CheckpointError(f"{scale}: has blocks, but config.json gives no weight_block_size", _ORIGINAL)
            block = (int(size[0]), int(size[1]))
            grid = tuple(-(-length // step) for length, step in zip(info.shape, block, strict=True))
            if source.tensors[scale].shape != grid:
                raise CheckpointError(
                    f"{scale}: is {list(source.tensors[scale].shape)}, but a matrix {list(info.shape)} in blocks of "
                    f"{list(block)} needs {list(grid)}",
                    "does config.json belong to these weights?",
                )
        made[name] = (info.shape, BlockDecoder(name, scale, block), f"FP8, {'block' if block else 'tensor'} scales")
    return made


def _compressed_tensors(source: Source, section: Mapping[str, Any]) -> Made:
    """Find the matrices of a compressed-tensors container."""
    schemes = Schemes.parse(_weights_only(section))
    # Every format stores this one; a module with it is quantized whatever else it has.
    modules = [n.removesuffix(".weight_scale") for n in source.tensors if n.endswith(".weight_scale")]
    written = [f"{module}.weight_shape" for module in modules if f"{module}.weight_shape" in source.tensors]
    shapes = {name: tuple(value.tolist()) for name, value in source.read(written).items()}
    made: Made = {}
    for module in modules:
        dtype = DTYPES[source.tensors[f"{module}.weight_scale"].dtype]
        dtype = dtype if dtype in FLOATS else torch.float32
        fmt = schemes.find((module,), dtype)
        if fmt is None and len(schemes.groups) == 1:  # named as in memory there, perhaps; no other scheme is possible
            fmt = schemes.groups[0].build(dtype)
        if fmt is None:
            raise CheckpointError(
                f"{module}: is stored quantized, but quantization_config assigns it no scheme",
                "config.json is incomplete",
            )
        shape = shapes.get(f"{module}.weight_shape") or _matrix_shape(source, module, fmt)
        decoder = PackedDecoder(module, fmt, shape)
        _check_parts(source, decoder)
        if f"{module}.weight" in source.tensors and f"{module}.weight" not in decoder.parts:
            raise CheckpointError(f"{module}: has both weight and weight_packed", "one must go: which is meant?")
        made[f"{module}.weight"] = (shape, decoder, fmt.name)
    return made


def _weights_only(section: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what concerns activations: they are not part of the dense checkpoint."""
    groups = section.get("config_groups")
    if isinstance(groups, Mapping):
        dropped = {"input_activations": None, "output_activations": None}
        groups = {key: {**entry, **dropped} if isinstance(entry, Mapping) else entry for key, entry in groups.items()}
    return {**section, "config_groups": groups, "kv_cache_scheme": None}


def _matrix_shape(source: Source, module: str, fmt: QuantFormat) -> tuple[int, int]:
    """Return `[out, in]` of a quantized matrix from its header."""
    packed = source.tensors.get(f"{module}.weight_packed")
    info = packed or source.tensors.get(f"{module}.weight")
    if info is None or len(info.shape) != 2:
        raise CheckpointError(f"{module}: has a weight_scale but no matrix it scales", "the checkpoint is incomplete")
    per_item = 8 * DTYPES[info.dtype].itemsize // fmt.bits if packed else 1
    return info.shape[0], info.shape[1] * per_item


def _check_parts(source: Source, decoder: PackedDecoder) -> None:
    """Raise unless the tensors on disk are those the format stores for a matrix of this shape."""
    if reason := decoder.fmt.refuse(decoder.shape):
        raise CheckpointError(f"{decoder.module}: {decoder.fmt.name}: {reason}", "does config.json belong to it?")
    for suffix, slot in decoder.fmt.layout(decoder.shape).items():
        name = f"{decoder.module}.{suffix}"
        info = source.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{name}: is missing, {decoder.fmt.name} needs it", "the checkpoint is incomplete")
        if not fits(info, slot):
            raise CheckpointError(
                f"{name}: is {info.dtype} {list(info.shape)}, but {decoder.fmt.name} of a matrix "
                f"{list(decoder.shape)} needs {DTYPE_NAMES[slot.dtype]} {list(slot.shape)}",
                "does config.json belong to these weights?",
            )


def _dense_dtype(source: Source, parts: set[str]) -> str:
    """Return the dtype of the model the checkpoint stands for: the config's, else that of most dense tensors."""
    text = source.config.get("text_config")
    for holder in (source.config, text if isinstance(text, Mapping) else {}):
        name = holder.get("dtype", holder.get("torch_dtype"))
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if dtype in FLOATS:
            return DTYPE_NAMES[dtype]
    sizes: Counter[str] = Counter()
    for name, info in source.tensors.items():
        if name not in parts and DTYPES[info.dtype] in FLOATS:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "BF16"


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = copy.deepcopy(dict(config))
    for holder in (cleaned, cleaned.get("text_config")):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                holder.pop(key, None)
    return cleaned


def _notes(formats: Counter[str], method: str, dtype: str, dropped: int) -> list[str]:
    """Say what was undone: the result inherits its error."""
    what = ", ".join(f"{count} from {name}" for name, count in sorted(formats.items()))
    notes = [
        f"the source is quantized already ({method}): {sum(formats.values())} weights are dequantized to {dtype} first "
        f"({what}); the result cannot be better than that, and sizes before are those of the dequantized weights"
    ]
    if dropped:
        notes.append(f"{dropped} scales of quantized activations or KV caches in the source are left out")
    return notes
