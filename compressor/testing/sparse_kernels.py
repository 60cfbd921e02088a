"""Checks of products with weights of which two in four are kept; see `compressor.testing.kernels`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from compressor.testing.kernels import DTYPES, KernelResult


@dataclass(frozen=True)
class SparseCase:
    """One product to check.

    Attributes:
        m: Rows of activations.
        n: Rows of the weight.
        k: Columns of both.
        dtype: Of both.
        split: Programs that share the work along K; 0: by the rules.
        block_m: Rows of a program's activations; 0: by the rules.
        registers: Whether the matrix unit takes operands from registers alone.
        bias: Whether there is a bias.
        seed: Of the random numbers.
    """

    m: int
    n: int
    k: int
    dtype: str = "float16"
    split: int = 0
    block_m: int = 0
    registers: bool = False
    bias: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Name the case in test reports."""
        usual = {key: getattr(type(self), key, None) for key in asdict(self)}
        return "-".join(f"{value}" for key, value in asdict(self).items() if value != usual[key])


def sparse_weight(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return a random `[n, k]` of whose every four neighbours two are zero, sometimes more, at random places."""
    w = torch.randn(n, k // 4, 4, generator=generator)
    most = torch.randint(0, 8, (n, k // 4, 1), generator=generator).clamp(max=2)  # mostly two
    order = torch.rand(w.shape, generator=generator).argsort(-1)
    kept: Tensor = torch.where(order < most, w, 0.0)
    return kept.flatten(1).to(dtype)


def check(case: SparseCase, device: str = "cpu") -> KernelResult:
    """Run one case: on a GPU, or under the interpreter if the device is a CPU; results are float32."""
    from compressor.kernels.gpu import launch, sparse
    from compressor.kernels.gpu.tiles import Config, Tile

    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    dense = sparse_weight(case.n, case.k, dtype, generator)
    weight = sparse.pack(dense.to(device))
    assert weight is not None, "made sparse"
    x = torch.randn(case.m, case.k, generator=generator).to(dtype)
    bias = torch.randn(case.n, generator=generator).to(dtype) if case.bias else None
    config = None
    if case.split or case.block_m or case.registers:
        tile = Tile(case.block_m or 16, 64, 256, 4, 3)
        config = Config(tile, False, case.block_m >= 128, case.split or 1, case.registers)
    # A frame of NaN around the result, and NaN in it: what is not written, or written elsewhere, shows.
    frame = torch.full((case.m + 2, case.n + 16), torch.nan, device=device)
    out = frame[1:-1, :-16]
    arguments = (x.to(device), weight, None if bias is None else bias.to(device), config, out)
    launch.matmul(*arguments)
    first, outside = out.clone(), frame.clone()
    outside[1:-1, :-16] = torch.nan
    launch.matmul(*arguments)
    expected = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    gap, norms = (first.cpu().double() - expected).norm(dim=1), expected.norm(dim=1)
    return KernelResult(
        error=float(gap.norm() / norms.norm()),
        worst_row=float((gap / norms).max()),
        clean=bool(torch.isfinite(first).all() and torch.isnan(outside).all()),
        repeatable=torch.equal(first, out),
        weights_exact=torch.equal(launch.dequantize(weight, dtype).cpu(), dense),
    )
