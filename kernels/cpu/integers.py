"""Integer activations times integer weights on the CPU, exactly, by `torch._int_mm`: W8A8 and W6A6.

Inputs become the codes that `compressor.inputs` rounds them to, bit for bit; int8 times int8 is summed in int32;
scales, zero points and bias come at the end in float32 and the result is rounded once, as in the integer kernels for
GPUs. Few rows, where making codes takes longer than the product, meet PyTorch's operator for bytes with the values of
the codes, rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QParams, QuantFormat
from compressor.formats.ints import IntFormat
from compressor.inputs import InputOp, apply_ops
from compressor.kernels.gpu.int_weight import MAX_COLUMNS
from compressor.kernels.gpu.rounding import Rounding, fused

if TYPE_CHECKING:
    from compressor.kernels.dispatch import Problem

NAMES = ("int5", "int6", "int7", "int8", "int8-bytes")
"""Formats whose codes take a byte in memory here; those of fewer bits are faster, and smaller, as `cpu-packed`."""

FEW_ROWS = 8
"""Up to how many rows of activations `_weight_int8pack_mm` is faster: it reads the same bytes, and no codes are made.
Small layers would gain by it up to 15 rows, large ones up to 5."""

ROWS_AT_ONCE = 512
"""Rows of activations multiplied at once: bounds the memory of their sums, 4 bytes each."""

BYTES_AT_ONCE = 16

IN_CACHE = 1 << 17
"""Numbers that a thread treats in one step, between operations that read them again."""


@dataclass(frozen=True)
class IntegerLinear:
    """A weight of integers and the operations that turn its inputs into integers.

    Attributes:
        numbers: int8 `[n, k]`.
        scale: `[n]` in the dtype it is stored in.
        sums: int32 `[n]`, what every row of numbers sums up to; empty where inputs have no zero points.
        fmt: The format that can restore its bytes on disk.
        inputs: All operations on the input.
        before: Those that are not part of the rounding, which run first.
        rounding: The others.
    """

    numbers: Tensor
    scale: Tensor
    sums: Tensor
    fmt: QuantFormat
    inputs: tuple[InputOp, ...]
    before: tuple[InputOp, ...]
    rounding: Rounding

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory beside the layer's own input parameters, by name; empty ones left out."""
        pairs = (("numbers", self.numbers), ("scale", self.scale), ("sums", self.sums))
        return {f"runtime_{name}": tensor for name, tensor in pairs if tensor.numel()}

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `treated(x) @ weight.T + bias`: operations on the input are done here, `dtype` does not matter."""
        n, k = self.numbers.shape
        bias = None if bias is None else bias.to(x.dtype)
        if x.numel() <= FEW_ROWS * k and self._takes_few(x.dtype):
            values = apply_ops(self.inputs, x).reshape(-1, k)
            few: Tensor = torch.ops.aten._weight_int8pack_mm(values, self.numbers, self.scale)
            return (few if bias is None else few.add_(bias)).view(*x.shape[:-1], n)
        end = self.rounding
        out: Tensor = cpu_int_linear(
            apply_ops(self.before, x), self.numbers, self.scale, self.sums, bias, *end.tensors, end.bits,
            end.symmetric, end.clip,
        )  # fmt: skip
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        return (self.numbers.float() * self.scale.float()[:, None]).to(dtype)

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        assert isinstance(self.fmt, IntFormat)
        codes = self.numbers.view(torch.uint8).add(self.fmt.zero_code)
        return self.fmt.pack(codes, QParams(self.scale[:1] if self.fmt.per_tensor else self.scale[:, None]))

    def _takes_few(self, dtype: torch.dtype) -> bool:
        """Tell whether PyTorch's operator for bytes takes this weight; it reads 16 at a time."""
        return dtype == self.scale.dtype == torch.bfloat16 and self.numbers.shape[1] % BYTES_AT_ONCE == 0


def accepts(problem: Problem) -> str | None:
    """Return why integers cannot be multiplied for a problem, or None."""
    if problem.rounds != "int":
        return "multiplies integers, and its inputs are not rounded to any"
    if problem.op != "linear":
        return f"multiplies weights, does no {problem.op!r}"
    if problem.device != "cpu":
        return f"runs on CPUs, not on {problem.device}"
    if problem.format not in NAMES:
        return f"{problem.format} is no symmetric grid of 5 to 8 bit integers"
    if problem.group not in (0, problem.k, problem.n * problem.k):
        return f"takes one scale per output or matrix, not per {problem.group} inputs"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(problem.dtype).removeprefix('torch.')} models keep the exact simulation"
    if problem.k > MAX_COLUMNS:
        return f"sums of {problem.k} products may overflow int32 (at most {MAX_COLUMNS})"
    return _refuse_machine()


def run(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Refuse: here inputs arrive rounded, and this kernel takes them before that.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"a {fmt.name} layer must be prepared for kernels that round inputs", "call its `prepare` first"
    )


def prepare(packed: PackedTensor, fmt: QuantFormat, inputs: Sequence[InputOp]) -> IntegerLinear:
    """Lay a weight out, one number per byte, and take over the operations on its inputs.

    Raises:
        UnsupportedError: A format of other codes or of groups.
        CheckpointError: The tensors are not what the format stores.
    """
    codes, q = fmt.unpack(packed)
    if not isinstance(fmt, IntFormat) or not fmt.symmetric or q.scale.numel() not in (1, len(codes)):
        raise UnsupportedError(f"{fmt.name}: no symmetric integers with one scale per output", "use the reference")
    numbers = codes.sub(fmt.zero_code).view(torch.int8)  # [n, k]; bytes wrap around
    scale = q.scale.flatten().expand(len(numbers)).contiguous()
    before, rounding = fused(inputs, numbers.device)
    sums = torch.empty(0, dtype=torch.int32) if rounding.symmetric else numbers.sum(1, dtype=torch.int32)
    return IntegerLinear(numbers, scale, sums, fmt, tuple(inputs), before, rounding)


@torch.library.custom_op("compressor::cpu_int_linear", mutates_args=())
def cpu_int_linear(
    x: Tensor,
    numbers: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    input_bits: int,
    symmetric: bool,
    clip: float,
) -> Tensor:
    """Return `round(x) @ (numbers * scale).T + bias`, `[..., n]` in the dtype of `x`; see `IntegerLinear`."""
    n, k = numbers.shape
    if x.shape[-1] != k:
        raise UnsupportedError(f"inputs of {x.shape[-1]} columns for a weight of {k}", "is this the layer they go to?")
    rounding, scale = Rounding(input_bits, symmetric, clip, step, order, shift, factor), scale.float()
    flat = x.reshape(-1, k)
    out = x.new_empty(len(flat), n)
    totals = torch.empty(min(ROWS_AT_ONCE, len(flat)), n, dtype=torch.int32)  # once: new pages cost as much as products
    for part, results in zip(flat.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
        if len(part):
            codes, steps, zero = quantize(part, rounding)
            total = torch._int_mm(codes, numbers.T, out=totals[: len(part)])
            _finish(total, steps, zero, scale, sums, bias, results)
    return out.view(*x.shape[:-1], n)


@cpu_int_linear.register_fake
def _(
    x: Tensor,
    numbers: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    step: Tensor,
    order: Tensor,
    shift: Tensor,
    factor: Tensor,
    input_bits: int,
    symmetric: bool,
    clip: float,
) -> Tensor:
    torch._check(x.shape[-1] == numbers.shape[1], lambda: f"inputs of {x.shape[-1]} columns for {numbers.shape[1]}")
    return x.new_empty(*x.shape[:-1], numbers.shape[0])


def quantize(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `rounding.codes_of` returns for integers and at least one row, faster.

    Rows that have NaN, or Inf where they make their own scale, get the scale NaN and whatever codes.

    Returns:
        Codes int8 `[m, k]`, scales float32 `[m, 1]`, and zero points float32 `[m, 1]`, empty for symmetric grids.
    """
    m, k = x.shape
    half = 1 << (rounding.bits - 1)
    codes = torch.empty(m, k, dtype=torch.int8)
    scales = torch.empty(m, 1)
    zeros = torch.empty(0 if rounding.symmetric else m, 1)
    at_once = max(1, IN_CACHE * torch.get_num_threads() // k)
    wide, sizes = torch.empty(2, min(at_once, m), k)
    for start in range(0, m, at_once):
        rows = slice(start, min(start + at_once, m))
        count = rows.stop - start
        v = wide[:count].copy_(_moved(x[rows], rounding))
        if rounding.step.numel():
            scale = torch.where(v.amax(1, keepdim=True).isnan(), torch.nan, rounding.step)
            v.div_(rounding.step)
        elif rounding.symmetric:
            largest = torch.abs(v, out=sizes[:count]).amax(1, keepdim=True)
            scale = _positive(largest * rounding.clip / ((2**rounding.bits - 1) / 2))
            v.div_(scale)
        else:
            low = v.amin(1, keepdim=True).clamp_(max=0) * rounding.clip
            high = v.amax(1, keepdim=True).clamp_(min=0) * rounding.clip
            scale = _positive((high - low) / (2**rounding.bits - 1))
            zeros[rows] = (-half - low / scale).clamp_(-half, half - 1).round_().nan_to_num_(0.0)
            v.div_(scale).add_(zeros[rows])
        codes[rows] = v.clamp_(-half, half - 1).round_()
        scales[rows] = torch.where(scale.isfinite(), scale, torch.nan)
    return codes, scales, zeros


def _moved(x: Tensor, rounding: Rounding) -> Tensor:
    """Return inputs with what happens to them before they are rounded, in their own dtype."""
    if rounding.order.numel():
        x = x.index_select(-1, rounding.order)
    if rounding.shift.numel():
        x = x - rounding.shift.to(x.dtype)
    return x * rounding.factor.to(x.dtype) if rounding.factor.numel() else x


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def _finish(
    total: Tensor, steps: Tensor, zero: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Turn sums of integers `[m, n]`, which are overwritten, into results, rounded once.

    Args:
        total: int32 `[m, n]`.
        steps: float32 `[m, 1]`.
        zero: float32 `[m, 1]`, or empty.
        scale: float32 `[n]`.
        sums: int32 `[n]`, or empty.
        bias: `[n]` or None.
        out: Floating point `[m, n]`.
    """
    m, n = total.shape
    at_once = max(1, IN_CACHE * torch.get_num_threads() // n)
    points = zero.to(torch.int32)
    wide = torch.empty(min(at_once, m), n)
    for start in range(0, m, at_once):
        rows = slice(start, min(start + at_once, m))
        part = total[rows]
        if len(points):
            part.sub_(points[rows] * sums)
        values = wide[: len(part)].copy_(part).mul_(steps[rows]).mul_(scale)
        if bias is not None:
            values.add_(bias)
        out[rows] = values


@lru_cache(maxsize=1)
def _refuse_machine() -> str | None:
    """Return why this machine does not multiply bytes fast, or not exactly, or None.

    Processors without instructions for it add pairs of products in 16 bits first, which saturate.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or not torch.backends.mkldnn.is_available():
        return f"is fast with oneDNN and AVX2 or AVX-512, not here ({torch.backends.cpu.get_cpu_capability()})"
    numbers = torch.tensor([[-128], [127], [0]], dtype=torch.int8).repeat(1, 512)
    for rows in (1, 32):
        codes = numbers[:1].expand(rows, 512).contiguous()
        if not torch.equal(torch._int_mm(codes, numbers.T), (codes.long() @ numbers.T.long()).to(torch.int32)):
            return "products of bytes are not exact on this processor"
    return None
