"""What the numbers of a checkpoint are like: counts of values that must not be there, a few modules at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.check.checkpoint import Checkpoint, Module
from compressor.check.on_tensors import layout_findings
from compressor.check.scheme import Scheme
from compressor.checkpoint.source import DTYPES
from compressor.formats.base import PackedTensor
from compressor.formats.bitstream import pack_bits
from compressor.plan import Kind

SCALES = ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale", "output_scale")
GLOBALS = ("weight_global_scale", "input_global_scale")
_E8M0_NAN = 255
BATCH_BYTES = 64 << 20
"""About how much is read from disk at once."""


@dataclass(frozen=True)
class Counts:
    """How many of a tensor's values are of which kind."""

    total: int
    not_finite: int
    zero: int = 0
    negative: int = 0


@dataclass(frozen=True)
class Facts:
    """What one quantized module holds.

    Attributes:
        scales: Suffix -> counts.
        globals: Suffix -> the value of a global scale.
        bad_codes: Codes that mean NaN or lie outside the grid.
        padding: Bits set where a row has no codes any more.
        all_zero: Every weight is zero.
    """

    scales: Mapping[str, Counts]
    globals: Mapping[str, float] = field(default_factory=dict)
    bad_codes: int = 0
    padding: int = 0
    all_zero: bool = False


@dataclass(frozen=True)
class DenseFacts:
    """What one dense tensor holds: values that are not finite, and whether it (or which expert of it) is zero."""

    counts: Counts
    all_zero: bool
    zero_experts: tuple[int, ...] = ()


def packed_facts(checkpoint: Checkpoint) -> Iterator[tuple[str, Facts]]:
    """Yield the facts of every quantized module, in the order of their names."""
    wrong = {finding.where.rpartition(".")[0] for finding in layout_findings(checkpoint)}
    modules = [checkpoint.modules[name] for name in sorted(checkpoint.modules)]
    for batch in _batches(modules):
        stored = checkpoint.read(entry.name for module in batch for entry in module.tensors.values())
        for module in batch:
            tensors = {suffix: stored[entry.name] for suffix, entry in module.tensors.items()}
            yield module.name, _facts(module, tensors, sound=module.name not in wrong)


def _batches(modules: Iterable[Module]) -> Iterator[list[Module]]:
    """Group modules so that one opening of the files serves several."""
    batch: list[Module] = []
    size = 0
    for module in modules:
        batch.append(module)
        size += sum(entry.nbytes for entry in module.tensors.values())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def dense_facts(checkpoint: Checkpoint) -> Iterator[tuple[str, DenseFacts]]:
    """Yield the facts of every dense floating-point tensor."""
    for name in sorted(checkpoint.tensors):
        if checkpoint.owner(name) is not None or not DTYPES[checkpoint.tensors[name].dtype].is_floating_point:
            continue
        tensor = checkpoint.read([name])[name]
        if not tensor.numel():
            continue
        model = checkpoint.model
        kind = Kind.OTHER if isinstance(model, Exception) else model.kind(name)
        zero = False
        experts: tuple[int, ...] = ()
        if kind in (Kind.LINEAR, Kind.EXPERT, Kind.ROUTER):
            zero = not bool(tensor.any())
            if tensor.ndim == 3 and not zero:
                experts = tuple(int(index) for index in (~tensor.flatten(1).any(1)).nonzero().flatten())
        yield name, DenseFacts(_counts(tensor), zero, experts)


def _facts(module: Module, tensors: Mapping[str, Tensor], sound: bool) -> Facts:
    scales = {suffix: _counts(tensors[suffix]) for suffix in SCALES if suffix in tensors}
    shared = {
        suffix: float(tensors[suffix].float().reshape(-1)[0])
        for suffix in GLOBALS
        if suffix in tensors and tensors[suffix].numel() == 1
    }
    if not sound or module.scheme is None or module.shape is None or module.scheme.refuse(module.shape):
        return Facts(scales, shared)
    bad, padding, zero = _codes(module.scheme, module.shape, tensors)
    return Facts(scales, shared, bad, padding, zero)


def _counts(tensor: Tensor) -> Counts:
    if not tensor.is_floating_point():
        bad = int((tensor == _E8M0_NAN).sum()) if tensor.dtype == torch.uint8 else 0
        return Counts(tensor.numel(), bad)
    values = tensor.float()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return Counts(values.numel(), 0, int((values == 0).sum()), int((values < 0).sum()))
    return Counts(values.numel(), int((~finite).sum()), int((values == 0).sum()), int(((values < 0) & finite).sum()))


def _codes(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    """Return the number of bad codes, of set padding bits, and whether all weights are zero."""
    if scheme.native:
        fmt = scheme.native
        packed = PackedTensor(fmt.name, shape, {key: tensors[key] for key in fmt.layout(shape)})
        values = fmt.decode(*fmt.unpack(packed))
        return int((~torch.isfinite(values)).sum()), 0, not bool(values.any())
    if "weight_packed" not in tensors:
        return _byte_codes(scheme, tensors["weight"])
    codes = tensors["weight_packed"]
    if scheme.container == "pack-quantized":
        return 0, _padding_bits(codes, shape[1] * scheme.bits), scheme.symmetric and _all_middle(codes, scheme, shape)
    if scheme.container == "mxfp6-pack-quantized":
        # Four codes in three bytes; the sign is the highest of each six bits.
        words = codes.reshape(-1, 3).to(torch.int32)
        joined = words[:, 0] | words[:, 1] << 8 | words[:, 2] << 16
        return 0, 0, not bool((joined & ~0x820820).any())
    return 0, 0, not bool((codes & 0x77).any())  # two E2M1 codes, without their signs


def _byte_codes(scheme: Scheme, codes: Tensor) -> tuple[int, int, bool]:
    """The same for codes that fill whole bytes."""
    if codes.dtype == torch.int8:
        half = 1 << (scheme.bits - 1)
        outside = 0 if scheme.bits == 8 else int(((codes < -half) | (codes > half - 1)).sum())
        return outside, 0, scheme.symmetric and not bool(codes.any())
    magnitude = codes.view(torch.uint8) & 0x7F
    return int((magnitude == 0x7F).sum()), 0, not bool(magnitude.any())


def _padding_bits(words: Tensor, used: int) -> int:
    """Count the rows whose last word has bits set behind its last code."""
    left = used % 32
    if not left:
        return 0
    last = words[:, -1].to(torch.int64) & 0xFFFFFFFF
    return int((last >> left != 0).sum())


def _all_middle(words: Tensor, scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether every code is the one that means zero."""
    row = pack_bits(torch.full((1, shape[1]), 1 << (scheme.bits - 1), dtype=torch.uint8), scheme.bits)
    return bool((words == row).all())
