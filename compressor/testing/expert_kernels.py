"""Checks of products with experts in one launch against float64; see `compressor.testing.kernels`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from compressor.testing.kernels import DTYPES, KernelCase, KernelResult, as_multiplied, build_weight


@dataclass(frozen=True)
class ExpertCase:
    """One product with experts to check.

    Attributes:
        format: As in `KernelCase`, as the next one.
        group: See `format`.
        tokens: Rows of activations.
        per_token: Experts of each.
        experts: How many there are; token r chooses at random among these and "none".
        n: Rows of a weight.
        k: Columns of it.
        dtype: Dtype of activations.
        scale_dtype: Dtype of the format's scales.
        chosen: `random`; `one` (all the last), `none`, or `each` (the first tokens one each, then nobody).
        block_m: Rows of a block; 0: by the rules.
        split: Programs that share the work along K; 0: by the rules.
        seed: Of the random numbers.
    """

    format: str
    group: int | None
    tokens: int
    per_token: int
    experts: int
    n: int
    k: int
    dtype: str = "float16"
    scale_dtype: str | None = None
    chosen: str = "random"
    block_m: int = 0
    split: int = 0
    seed: int = 0

    def __str__(self) -> str:
        """Name the case in test reports."""
        usual = {key: getattr(type(self), key, None) for key in asdict(self)}
        return "-".join(f"{value}" for key, value in asdict(self).items() if value != usual[key])


def check(case: ExpertCase, device: str = "cpu") -> KernelResult:
    """Run one case: on a GPU, or under the interpreter if the device is a CPU; results are float32."""
    from compressor.kernels.gpu import experts, launch
    from compressor.kernels.gpu.prepare import prepare

    generator = torch.Generator().manual_seed(case.seed)
    like = KernelCase(case.format, case.group, 0, case.n, case.k, case.dtype, case.scale_dtype)
    built = [build_weight(like, generator) for _ in range(case.experts)]
    dtype = DTYPES[case.dtype]
    dense = torch.stack([as_multiplied(packed, fmt, values, dtype) for packed, fmt, values in built])
    stack = experts.stack([prepare(packed, fmt).to(device) for packed, fmt, _ in built])
    assert stack is not None, "equal formats have equal layouts"
    rows = case.tokens * case.per_token
    x = torch.randn(case.tokens, case.k, generator=generator).to(dtype)
    chosen = torch.randint(0, case.experts + 1, (rows,), generator=generator)
    if case.chosen != "random":
        chosen[:] = case.experts if case.chosen in ("none", "each") else case.experts - 1
    if case.chosen == "each":
        chosen[: case.experts] = torch.arange(case.experts)
    block_m = case.block_m or experts.block_rows(rows, case.experts)
    routing = experts.route(chosen.to(device), case.experts, block_m)
    config = launch.configuration(stack, block_m, dtype, x.to(device).device, "")
    config = replace(config, split=case.split or config.split)
    frame = torch.full((rows + 2, case.n + 16), torch.nan, device=device)
    out = frame[1:-1, :-16]
    launch.grouped_matmul(x.to(device), stack, routing, config, out)
    first, outside = out.clone(), frame.clone()
    outside[1:-1, :-16] = torch.nan
    launch.grouped_matmul(x.to(device), stack, routing, config, out)
    real = chosen < case.experts
    inputs = x.double().repeat_interleave(case.per_token, 0)[real]
    expected = torch.einsum("rk,rnk->rn", inputs, dense.double()[chosen[real]])
    gap = (first.cpu().double()[real] - expected).norm(dim=1)
    norms = expected.norm(dim=1)
    plain = experts.linear(x, stack.to("cpu"), experts.route(chosen, case.experts, block_m), rows)
    close = (plain.double()[real] - expected).norm() <= 1e-2 * expected.norm() and not plain[~real].any()
    return KernelResult(
        error=float(gap.norm() / norms.norm()) if real.any() else 0.0,
        worst_row=float((gap / norms).nan_to_num(torch.inf).max()) if real.any() else 0.0,
        clean=bool(torch.isfinite(first.cpu()[real]).all() and torch.isnan(outside).all())
        and bool(first.cpu()[~real].isnan().all()),  # rows without an expert are not written
        repeatable=torch.equal(first.nan_to_num(7.0), out.nan_to_num(7.0)),
        weights_exact=bool(close),
    )
