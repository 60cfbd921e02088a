"""Choosing the kernel for a problem: the first that accepts it; the reference is last and accepts everything.

Set `COMPRESS_KERNEL` to a kernel's name to force it. Nothing here touches a device at import time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from compressor.errors import RecipeError, UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat, group_setting
from compressor.inputs import InputOp
from compressor.kernels.cpu import integers, numbers, table
from compressor.kernels.cpu import kernel as cpu
from compressor.kernels.cpu.integers import IntegerLinear
from compressor.kernels.gpu import fp8, int_kernel, rounding
from compressor.kernels.gpu import kernel as triton
from compressor.kernels.gpu.fp8 import Fp8Linear
from compressor.kernels.gpu.int_kernel import RoundedLinear
from compressor.kernels.reference.linear import packed_linear

ENV = "COMPRESS_KERNEL"
LOGGER = logging.getLogger("compressor.kernels")


@dataclass(frozen=True)
class Problem:
    """One operation on one shape.

    Attributes:
        op: `linear`.
        format: Format name.
        m: Rows of the activations.
        n: Outputs.
        k: Inputs.
        group: Weights per scale; 0 when a whole row of inputs shares one, `n * k` for integers with one in all.
        dtype: Dtype of the activations.
        device: Device type, `cpu` or `cuda`.
        capability: CUDA compute capability; (0, 0) elsewhere.
        scale: Dtype of the stored scales, of formats that leave a choice.
        rounds: What activations are rounded to, if a kernel may do that itself; see `rounding.kind_of`.
    """

    op: str
    format: str
    m: int
    n: int
    k: int
    group: int
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] = (0, 0)
    scale: torch.dtype | None = None
    rounds: str = ""


class Prepared(Protocol):
    """A weight in the layout a kernel reads fastest, made once when it is loaded; what lies on disk never changes."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name."""
        ...

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return what `Kernel.run` returns for the weight."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`, decoded in float32 and rounded to `dtype` once."""
        ...

    def restore(self) -> PackedTensor:
        """Return the weight as it lies on disk."""
        ...


TREATS_INPUTS = (RoundedLinear, Fp8Linear, IntegerLinear)
"""Prepared weights that want inputs as they come: what happens to them is done with the product."""


@dataclass(frozen=True)
class Kernel:
    """An implementation.

    Attributes:
        name: What `COMPRESS_KERNEL` and reports call it.
        accepts: Returns None for a problem it can do, else the reason it refuses.
        run: `(x, packed, fmt, bias, dtype) -> Tensor`, as `kernels.reference.linear.packed_linear`.
        prepare: Lays a weight out for this kernel; None if it reads weights as they lie on disk.
        prepare_rounded: The same of kernels that also do what happens to the inputs.
    """

    name: str
    accepts: Callable[[Problem], str | None]
    run: Callable[[Tensor, PackedTensor, QuantFormat, Tensor | None, torch.dtype], Tensor]
    prepare: Callable[[PackedTensor, QuantFormat], Prepared] | None = None
    prepare_rounded: Callable[[PackedTensor, QuantFormat, Sequence[InputOp]], Prepared] | None = None


def _accepts_all(problem: Problem) -> str | None:
    return None


KERNELS: tuple[Kernel, ...] = (
    Kernel("triton-int", int_kernel.accepts, int_kernel.run, prepare_rounded=int_kernel.prepare),
    Kernel("torch-fp8", fp8.accepts, int_kernel.run, prepare_rounded=fp8.prepare),
    Kernel("cpu-int", integers.accepts, integers.run, prepare_rounded=integers.prepare),
    Kernel(triton.TRITON, triton.accepts, triton.run, triton.prepare),
    Kernel("cpu-packed", cpu.accepts_few, cpu.run, cpu.prepare),
    Kernel("cpu-decode", cpu.accepts, cpu.run_decoded, cpu.prepare_decoded),
    Kernel("cpu-numbers", numbers.accepts, numbers.run, numbers.prepare),
    Kernel("cpu-table", table.accepts, table.run, table.prepare),
    Kernel("reference", _accepts_all, packed_linear),
)


def pick(problem: Problem) -> Kernel:
    """Return the kernel for a problem: the forced one, or the first that accepts.

    Raises:
        RecipeError: `COMPRESS_KERNEL` names no kernel.
        UnsupportedError: The forced kernel refuses the problem.
    """
    kernel = choose(problem, KERNELS, os.environ.get(ENV, ""))
    _log_choice(kernel.name, problem.op, problem.format, problem.n, problem.k, problem.group, problem.device)
    return kernel


@lru_cache(maxsize=4096)
def choose(problem: Problem, kernels: tuple[Kernel, ...], forced: str = "") -> Kernel:
    """Return the first of `kernels` that accepts the problem, or the one named `forced`; see `pick`."""
    if forced:
        by_name = {kernel.name: kernel for kernel in kernels}
        if forced not in by_name:
            raise RecipeError(f"{ENV}={forced!r} is no kernel", f"choose one of: {', '.join(by_name)}, or unset it")
        reason = by_name[forced].accepts(problem)
        if reason is not None:
            raise UnsupportedError(f"kernel {forced!r} refuses {problem}: {reason}", f"unset {ENV}")
        return by_name[forced]
    return next(kernel for kernel in kernels if kernel.accepts(problem) is None)


def explain(problem: Problem) -> tuple[tuple[str, str | None], ...]:
    """Return every kernel's name and its reason to refuse the problem (None: it accepts), in the order tried."""
    return tuple((kernel.name, kernel.accepts(problem)) for kernel in KERNELS)


def linear_problem(
    packed: PackedTensor,
    fmt: QuantFormat,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    inputs: Sequence[InputOp] = (),
) -> Problem:
    """Describe multiplying `[m, in]` activations, which `inputs` have not treated yet, by a packed weight."""
    n, k = packed.shape
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    group = n * k if group_setting(fmt) == "tensor" else fmt.group_size or 0
    scale = getattr(fmt, "dtype", None)
    rounds = rounding.kind_of(inputs)
    return Problem("linear", packed.format, m, n, k, group, dtype, device.type, capability, scale, rounds)


def prepare(
    packed: PackedTensor, fmt: QuantFormat, dtype: torch.dtype, inputs: Sequence[InputOp] = ()
) -> Prepared | None:
    """Lay a weight out for the kernel that will multiply it by single rows of `dtype` on the device it is on.

    Args:
        packed: The weight.
        fmt: Its format.
        dtype: The model's.
        inputs: What happens to inputs before.

    Returns:
        None if that kernel reads weights as they lie on disk. Those of `TREATS_INPUTS` want inputs that are not
        treated yet.
    """
    device = next(iter(packed.tensors.values())).device
    kernel = pick(linear_problem(packed, fmt, 1, dtype, device, inputs))
    if kernel.prepare_rounded is not None:
        return kernel.prepare_rounded(packed, fmt, inputs)
    return None if kernel.prepare is None else kernel.prepare(packed, fmt)


def prepare_pruned(weight: Tensor) -> triton.PrunedWeight | None:
    """Lay a dense weight out for a kernel that reads only what is left of it, where it is.

    Args:
        weight: `[out, in]`. That at least two of every four neighbours in a row are zero is checked, not assumed.

    Returns:
        None if it is not so, or nothing here gains by it: then it is multiplied as it is.

    Raises:
        RecipeError: `COMPRESS_KERNEL` names no kernel.
    """
    n, k = weight.shape
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (0, 0)
    problem = Problem("linear", "2:4", 1, n, k, 0, weight.dtype, weight.device.type, capability)
    forced = os.environ.get(ENV, "")
    if forced and forced not in (kernel.name for kernel in KERNELS):
        choose(problem, KERNELS, forced)
    prepared = triton.prepare_pruned(problem, weight) if forced in ("", triton.TRITON) else None
    if prepared is not None:
        _log_choice(triton.TRITON, "linear", "2:4", n, k, 0, weight.device.type)
    return prepared


def linear(x: Tensor, packed: PackedTensor, fmt: QuantFormat, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by a packed weight with whatever kernel fits; arguments as `packed_linear`."""
    problem = linear_problem(packed, fmt, x.numel() // x.shape[-1], x.dtype, x.device)
    return pick(problem).run(x, packed, fmt, bias, dtype)


@lru_cache(maxsize=4096)
def _log_choice(kernel: str, op: str, fmt: str, n: int, k: int, group: int, device: str) -> None:
    """Say once per weight shape which kernel runs; the cache is what makes it once."""
    LOGGER.info("%s %s [%d, %d] groups of %s on %s: %s kernel", op, fmt, n, k, group or "a row", device, kernel)
