"""Checks of the packed kernels against float64, under Triton's interpreter or on a GPU.

The interpreter must be chosen before Triton is imported, and then kernels cannot be compiled any more. So tests start
a process of their own (`Interpreter`), which this module is the main program of: one case per line in, one result per
line out, both JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from compressor.formats import get_format
from compressor.formats.base import PackedTensor, QParams, QuantFormat
from compressor.formats.codebook import Codebook
from compressor.formats.float4 import SPLITS, Float4
from compressor.formats.power import Power
from compressor.testing.grids import mirrored

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class KernelCase:
    """One multiplication to check.

    Attributes:
        format: Name of the weight's format; `fp4:e3m0` and so on for a split of `fp4`, `power4:0.3` for an exponent,
            `codebook4:skewed` for a random table without symmetry.
        group: Its group size; None for whole rows, -1 for one scale in all.
        m: Rows of activations.
        n: Rows of the weight.
        k: Columns of both.
        dtype: Dtype of activations, and of the format's scales unless `scale_dtype` is given.
        scale_dtype: Dtype of the format's scales.
        codes: `random`, `lowest` or `highest`; or `fitted` to a normal weight.
        x: `normal`, `shifted` (mean 3), `outliers` (some columns 100 times as large), or `strided` (a view).
        bias: Whether there is a bias.
        config: `[block_m, block_n, block_k, warps, stages, on_weights, carry, split]` and, if true, `registers`; by the
            tile table if None.
        seed: Of the random numbers.
    """

    format: str
    group: int | None
    m: int
    n: int
    k: int
    dtype: str = "float16"
    scale_dtype: str | None = None
    codes: str = "fitted"
    x: str = "normal"
    bias: bool = False
    config: (
        tuple[int, int, int, int, int, bool, bool, int] | tuple[int, int, int, int, int, bool, bool, int, bool] | None
    ) = None
    seed: int = 0

    def __str__(self) -> str:
        """Name the case in test reports."""
        shown = {**asdict(self), "group": {None: "row", -1: "matrix"}.get(self.group, self.group)}
        usual = {key: getattr(type(self), key, None) for key in shown}
        return "-".join(f"{shown[key]}".replace(" ", "") for key in shown if shown[key] != usual[key])


class Case(Protocol):
    """A dataclass of JSON values, in whose module there is a `check(case)`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class KernelResult:
    """How a kernel did.

    Attributes:
        error: Norm of the error over the norm of the float64 result.
        worst_row: The same for the worst row of activations.
        clean: Whether everything was written, and nothing outside the result.
        repeatable: Whether a second call gave the same bits.
        weights_exact: Whether the weight written out dense equals what the format decodes, bit for bit but for the
            sign of zeros. Of integer products: whether inputs got the codes, scales and zero points of the reference.
            Of experts: whether the plain version is as right.
    """

    error: float
    worst_row: float
    clean: bool
    repeatable: bool
    weights_exact: bool


def build_weight(case: KernelCase, generator: torch.Generator) -> tuple[PackedTensor, QuantFormat, Tensor]:
    """Return a random packed weight, its format, and what it decodes to in float32."""
    name, _, split = case.format.partition(":")
    scale_dtype = DTYPES[case.scale_dtype or case.dtype]
    if name.startswith("codebook"):  # no name users type: methods bring their own tables
        fmt: QuantFormat = Codebook(int(name.removeprefix("codebook")), case.group)
    else:
        fmt = get_format(name, "tensor" if case.group == -1 else case.group, scale_dtype)
    w = torch.randn(case.n, case.k, generator=generator) * torch.linspace(0.01, 2, case.n)[:, None]
    q = _params(fmt, w, split, generator)
    codes = fmt.encode(w, q)
    if case.codes != "fitted":
        codes = _codes(case.codes, codes, fmt.bits, generator)
    packed = fmt.pack(codes, q)
    return packed, fmt, fmt.decode(codes, q)


def check(case: KernelCase, device: str = "cpu") -> KernelResult:
    """Run one case: on a GPU, or under the interpreter if the device is a CPU."""
    from compressor.kernels.gpu import launch
    from compressor.kernels.gpu.prepare import prepare
    from compressor.kernels.gpu.tiles import Config, Tile

    generator = torch.Generator().manual_seed(case.seed)
    packed, fmt, dense = build_weight(case, generator)
    weight = prepare(packed, fmt).to(device)
    x = _activations(case, generator).to(device)
    bias = torch.randn(case.n, generator=generator).to(DTYPES[case.dtype]).to(device) if case.bias else None
    config = None if case.config is None else Config(Tile(*case.config[:5]), *case.config[5:])
    # A frame of NaN around the result, and NaN in it: what is not written, or written elsewhere, shows.
    frame = torch.full((case.m + 2, case.n + 16), torch.nan, dtype=torch.float32, device=device)
    out = frame[1:-1, :-16]
    launch.matmul(x, weight, bias, config, out)
    first = out.clone()
    outside = frame.clone()
    outside[1:-1, :-16] = torch.nan
    launch.matmul(x, weight, bias, config, out)
    expected = x.cpu().double() @ as_multiplied(packed, fmt, dense, x.dtype).double().T
    if bias is not None:
        expected += bias.cpu().double()
    gap = (first.cpu().double() - expected).norm(dim=1)
    norms = expected.norm(dim=1).clamp_(min=1e-30)  # all weights may be zero
    later = launch.dequantize(weight, torch.float32, 64).cpu() if case.n > 64 else dense[64:]
    return KernelResult(
        error=float(gap.norm() / norms.norm()) if case.m else 0.0,
        worst_row=float((gap / norms).nan_to_num(torch.inf).max()) if case.m else 0.0,
        clean=bool(torch.isfinite(first).all() and torch.isnan(outside).all()),
        repeatable=torch.equal(first, out),
        weights_exact=torch.equal(launch.dequantize(weight, torch.float32).cpu(), dense)
        and torch.equal(later, dense[64:]),
    )


class Interpreter:
    """A process in which Triton interprets kernels; a context manager."""

    def __enter__(self) -> Interpreter:
        """Start the process."""
        command = [sys.executable, "-m", "compressor.testing.kernels"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def check(self, case: Case) -> KernelResult:
        """Run one case there: what `check` of the module that defines it returns.

        Raises:
            AssertionError: The kernel raised; the message is its traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([type(case).__module__, type(case).__name__, asdict(case)]) + "\n")
        self._process.stdin.flush()
        answer: Mapping[str, Any] = json.loads(self._process.stdout.readline() or '{"traceback": "the process died"}')
        assert "traceback" not in answer, answer["traceback"]
        return KernelResult(**answer)


def _params(fmt: QuantFormat, w: Tensor, variant: str, generator: torch.Generator) -> QParams:
    if isinstance(fmt, Float4):
        return fmt.fit_table(w, SPLITS[variant])
    if isinstance(fmt, Power) and variant:
        return fmt.params(fmt.absmax(w), float(variant))
    if isinstance(fmt, Codebook) and variant == "skewed":
        table = torch.randn(1 << fmt.bits, generator=generator).exp_().sub_(1.0)
        table[3] = 0.0
        return fmt.fit_table(w, tuple(table.tolist()))
    return mirrored(fmt, fmt.fit(w))


def as_multiplied(packed: PackedTensor, fmt: QuantFormat, dense: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight with the entries of tables rounded to the dtype they are multiplied in, float32."""
    if not isinstance(fmt, Codebook) or isinstance(fmt, Float4):
        return dense
    codes, q = fmt.unpack(packed)
    assert q.codebook is not None, "tables are parameters"
    unit = 2.0 ** (int(torch.frexp(q.codebook.abs().amax())[1]) - 15)
    return fmt.decode(codes, replace(q, codebook=(q.codebook / unit).to(dtype).float() * unit))


def _codes(kind: str, like: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    if kind == "random":
        return torch.randint(0, 1 << bits, like.shape, generator=generator, dtype=torch.uint8)
    return torch.full_like(like, 0 if kind == "lowest" else (1 << bits) - 1)


def _activations(case: KernelCase, generator: torch.Generator) -> Tensor:
    x = torch.randn(case.m, case.k * (2 if case.x == "strided" else 1), generator=generator)
    if case.x == "shifted":
        x += 3
    elif case.x == "outliers":
        x[:, ::17] *= 100
    x = x.to(DTYPES[case.dtype])
    return x[:, ::2] if case.x == "strided" else x


def _main() -> None:
    """Answer cases until the input ends."""
    import traceback

    torch.set_num_threads(1)
    for line in sys.stdin:
        module_name, class_name, fields = json.loads(line)
        try:
            module = importlib.import_module(module_name)
            case = getattr(module, class_name)(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            )
            answer = asdict(module.check(case))
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
