"""Checks of the integer kernels against exact products; see `compressor.testing.kernels`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from compressor.formats import get_format
from compressor.formats.activations import INPUT_FORMATS
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.formats.small_floats import exponent_codes, largest_value
from compressor.inputs import InputOp, Permute, Quantize, Rotate, RoundFloat, Scale, Shift
from compressor.kernels.gpu.rounding import Rounding, codes_of, fused
from compressor.testing.grids import mirrored
from compressor.testing.kernels import DTYPES, KernelResult


@dataclass(frozen=True)
class IntCase:
    """One integer product to check.

    Attributes:
        format: Name of the weight's format.
        group: Its group size; None for whole rows, -1 for one scale in all.
        inputs: Name of the format of inputs; `fpq4:1` are small floats of 4 bits with one mantissa bit.
        m: Rows of activations.
        n: Rows of the weight.
        k: Columns of both.
        dtype: Dtype of activations.
        treated: Whether inputs are reordered, shifted and scaled first; small floats: whether channels are shifted.
        rotated: Columns of the blocks that are turned after they are reordered; 0: none.
        x: `normal`, `outliers` (some columns 100 times as large), `zeros` (some rows), or `nan` (one of them).
        bias: Whether there is a bias.
        tile: `[block_m, block_n, block_k, warps, stages]`; by the rules if None.
        split: Programs that share the work along K; 0: by the rules.
        seed: Of the random numbers.
    """

    format: str
    group: int | None
    inputs: str
    m: int
    n: int
    k: int
    dtype: str = "float16"
    treated: bool = False
    rotated: int = 0
    x: str = "normal"
    bias: bool = False
    tile: tuple[int, int, int, int, int] | None = None
    split: int = 0
    seed: int = 0

    def __str__(self) -> str:
        """Name the case in test reports."""
        usual = {key: getattr(type(self), key, None) for key in asdict(self)}
        return "-".join(f"{value}".replace(" ", "") for key, value in asdict(self).items() if value != usual[key])


def check(case: IntCase, device: str = "cpu") -> KernelResult:
    """Run one case: on a GPU, or under the interpreter if the device is a CPU.

    With 8-bit floats the product is PyTorch's, in bfloat16. Of integers the result is float32; its error is against an
    exact product of the reference's codes. Codes of inputs that are turned need not equal the reference's: see `_near`;
    then they are multiplied exactly.
    """
    from compressor.kernels.gpu import int_launch, int_weight
    from compressor.kernels.gpu.layout import PAD_COLUMNS
    from compressor.kernels.gpu.tiles import Tile

    generator = torch.Generator().manual_seed(case.seed)
    fmt = get_format(case.format, "tensor" if case.group == -1 else case.group, torch.bfloat16)
    w = torch.randn(case.n, case.k, generator=generator) * torch.linspace(0.01, 2, case.n)[:, None]
    q = mirrored(fmt, fmt.fit(w))
    codes = fmt.encode(w, q)
    if case.inputs.startswith("fp8"):
        return _check_floats(case, fmt.pack(codes, q), fmt, generator, device)
    weight, dense = int_weight.prepare(fmt.pack(codes, q), fmt), fmt.decode(codes, q)
    x = _activations(case, generator)
    _, rounding = fused(_ops(case, generator), torch.device("cpu"), rotations=True)
    bias = torch.randn(case.n, generator=generator).to(x.dtype) if case.bias else None
    reference = codes_of(x, rounding)
    columns = -(-case.k // PAD_COLUMNS) * PAD_COLUMNS
    weight = weight.to(device)
    found = int_launch.quantize(x.to(device), _on(rounding, device), columns)
    same = (_near if case.rotated else _equal)(_unpadded(found, case.k), reference, x.dtype)
    same &= not bool(found[0][:, case.k :].any())
    codes, scale, zero = _unpadded(found, case.k) if case.rotated else reference
    expected = (codes - (0 if rounding.symmetric else zero[:, None])).double() @ dense.double().T * scale[:, None]
    if bias is not None:
        expected += bias.double()
    frame = torch.full((case.m + 2, case.n + 16), torch.nan, device=device)
    out = frame[1:-1, :-16]
    tile = None if case.tile is None else Tile(*case.tile)
    int_launch.int_matmul(*found, weight, None if bias is None else bias.to(device), out, tile, case.split)
    first, outside = out.clone(), frame.clone()
    outside[1:-1, :-16] = torch.nan
    int_launch.int_matmul(*found, weight, None if bias is None else bias.to(device), out, tile, case.split)
    fine = ~scale.isnan()
    gap = (first.cpu().double() - expected)[fine].norm(dim=1)
    norms = expected[fine].norm(dim=1).clamp_(min=1e-30)
    return KernelResult(
        error=float(gap.norm() / norms.norm()) if case.m else 0.0,
        worst_row=float((gap / norms).nan_to_num(torch.inf).max()) if case.m else 0.0,
        clean=bool(torch.isfinite(first[fine.to(device)]).all() and torch.isnan(outside).all())
        and bool(first[~fine.to(device)].isnan().all()),
        repeatable=torch.equal(first.nan_to_num(7.0), out.nan_to_num(7.0)),
        weights_exact=bool(same),
    )


def _check_floats(
    case: IntCase, packed: PackedTensor, fmt: QuantFormat, generator: torch.Generator, device: str
) -> KernelResult:
    from compressor.kernels.gpu import fp8, int_launch

    x = _activations(case, generator)
    layer = fp8.prepare(packed, fmt, _ops(case, generator))
    expected_codes, scale, _ = codes_of(x, layer.rounding)
    found, found_scale, _ = int_launch.quantize(x.to(device), _on(layer.rounding, device), case.k)
    weight, steps = layer.weight.to(device), layer.scale.to(device)
    out, again = (fp8.scaled_product(found, found_scale, weight, steps, None).cpu() for _ in range(2))
    fine = ~scale.isnan()
    expected = expected_codes.view(torch.float8_e4m3fn).double() @ layer.dequantize(torch.float64).T * scale[:, None]
    gap, norms = (out.double() - expected)[fine].norm(dim=1), expected[fine].norm(dim=1).clamp_(min=1e-30)
    same = torch.equal(found.cpu()[fine], expected_codes[fine])
    return KernelResult(
        error=float(gap.norm() / norms.norm()),
        worst_row=float((gap / norms).max()),
        clean=bool(out[fine].isfinite().all() and out[~fine].isnan().all()),
        repeatable=torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0)),
        weights_exact=same and torch.equal(found_scale.cpu().nan_to_num(-1), scale.nan_to_num(-1)),
    )


def _on(rounding: Rounding, device: str) -> Rounding:
    step, order, shift, factor = (tensor.to(device) for tensor in rounding.tensors)
    matrix = None if rounding.matrix is None else rounding.matrix.to(device)
    return replace(rounding, step=step, order=order, shift=shift, factor=factor, matrix=matrix)


def _unpadded(found: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = (tensor.cpu() for tensor in found)
    return codes[:, :k], scale, zero


def _equal(found: tuple[Tensor, Tensor, Tensor], reference: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> bool:
    """Return whether codes, scales and zero points are the same; a row without a scale may have any codes."""
    fine = ~reference[1].isnan()
    same = torch.equal(found[0][fine], reference[0][fine])
    same &= torch.equal(found[1].nan_to_num(-1), reference[1].nan_to_num(-1))
    return same and (not found[2].numel() or torch.equal(found[2][fine], reference[2][fine]))


def _near(found: tuple[Tensor, Tensor, Tensor], reference: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> bool:
    """Return whether one code in 200 or fewer differs, by one step, and scales by one place of the inputs' dtype.

    Sums in another order differ in their last bit, which now and then pushes a number over a rounding boundary.
    """
    fine = ~reference[1].isnan()
    gap = (found[0].int() - reference[0].int())[fine].abs()
    near = torch.equal(found[1].isnan(), ~fine) and bool((gap <= 1).all()) and 200 * int(gap.sum()) <= gap.numel()
    near &= bool(((found[1] - reference[1])[fine].abs() <= torch.finfo(dtype).eps * reference[1][fine]).all())
    return near and (not found[2].numel() or bool(((found[2] - reference[2])[fine].abs() <= 1).all()))


def _ops(case: IntCase, generator: torch.Generator) -> tuple[InputOp, ...]:
    if case.inputs.startswith("fpq"):
        return (_small_floats(case, generator),)
    fmt = INPUT_FORMATS[case.inputs]
    last = Quantize(fmt, torch.tensor([0.02]) if fmt.static else None, 1.0 if fmt.static else 0.95)
    size = case.rotated
    turn: tuple[InputOp, ...] = ()
    if size:
        matrix, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        turn = (Rotate(matrix.half(), half=True),)
    if not case.treated:
        return (*turn, last)
    order = torch.randperm(case.k, generator=generator)
    shift, factor = torch.randn(case.k, generator=generator), torch.rand(case.k, generator=generator) + 0.5
    return Permute(order), *turn, Shift(shift), Scale(factor), last


def _small_floats(case: IntCase, generator: torch.Generator) -> RoundFloat:
    """Return an operation that saturates some inputs and rounds some to zero; exponents of channels take all values."""
    bits, mantissa = (int(number) for number in case.inputs.removeprefix("fpq").split(":"))
    most = exponent_codes(bits, mantissa) if case.treated else 1
    k = torch.randint(most, (case.k,), generator=generator).to(torch.int8)
    scale = torch.tensor([2.0 / largest_value(bits, mantissa)])
    return RoundFloat(bits, scale, torch.tensor([mantissa], dtype=torch.uint8), k)


def _activations(case: IntCase, generator: torch.Generator) -> Tensor:
    x = torch.randn(case.m, case.k, generator=generator)
    if case.x == "outliers":
        x[:, ::17] *= 100
    elif case.x == "zeros":
        x[::2] = 0
    elif case.x == "nan":
        x[0, 1] = torch.nan
    return x.to(DTYPES[case.dtype])
