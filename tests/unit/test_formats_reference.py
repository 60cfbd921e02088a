"""Bit equality with compressed-tensors, the library whose checkpoints we write: scales, codes, bytes, dense values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.formats.base import PackedTensor, QParams, QuantFormat, group_setting
from compressor.formats.e2m1 import E2M1_VALUES
from compressor.formats.fp8 import FP8
from compressor.formats.int_bytes import IntBytes
from compressor.formats.ints import IntFormat
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.nvfp4 import NVFP4

BF16 = torch.bfloat16
INTS = [IntFormat(bits, 64, BF16) for bits in range(2, 9)] + [
    IntFormat(4, 32, torch.float16),
    IntFormat(4, 64, torch.float32),
    IntFormat(3, None, BF16),
    IntFormat(8, None, torch.float32),
    *(IntFormat(bits, None, dtype, per_tensor=True) for bits, dtype in ((4, BF16), (8, torch.float32))),
]
ASYMMETRIC = [
    *(IntFormat(bits, 64, BF16, symmetric=False) for bits in range(2, 9)),
    IntFormat(4, 32, torch.float16, symmetric=False),
    IntFormat(4, 64, torch.float32, symmetric=False),
    IntFormat(3, None, BF16, symmetric=False),
    IntFormat(8, None, torch.float32, symmetric=False),
    *(
        IntFormat(bits, None, dtype, symmetric=False, per_tensor=True)
        for bits, dtype in ((3, BF16), (8, torch.float32))
    ),
]
FP8S = [FP8(granularity, dtype) for granularity in ("channel", "tensor", "block") for dtype in (BF16, torch.float32)]
BYTES = [IntBytes(None, BF16), IntBytes(None, torch.float32), IntBytes(None, BF16, per_tensor=True)]
FORMATS: list[QuantFormat] = [
    *INTS,
    *BYTES,
    *ASYMMETRIC,
    *FP8S,
    FP8("channel", torch.float16),
    NVFP4(),
    MXFP4(),
    MXFP8(),
]


def label(fmt: QuantFormat) -> str:
    return f"{fmt.name}-{group_setting(fmt)}-{getattr(fmt, 'dtype', '')}"


def uneven_weights(rows: int) -> Tensor:
    """Float32 weights `[rows, 192]` of uneven groups, with a zero row, zero groups, single zeros and tiny weights."""
    rng = torch.Generator().manual_seed(20240)
    size = torch.exp(torch.randn(rows, 6, 1, generator=rng))
    w = (0.02 * size * torch.randn(rows, 6, 32, generator=rng)).flatten(1)
    w[7] = 0
    w[9, 64:128] = 0
    w[torch.rand(w.shape, generator=rng) < 0.1] = 0
    w[3, 5:9] = -1e-9  # rounds to zero, in every format
    return w


@pytest.fixture(params=["float32", "bf16-origin", "several row blocks"])
def weights(request: pytest.FixtureRequest) -> Tensor:
    """See `uneven_weights`: 48 rows, or 300 of which one tile of 128 x 128 is zero; tiles fit in no direction."""
    if request.param == "several row blocks":
        w = uneven_weights(300)
        w[128:256, 128:] = 0
        return w
    w = uneven_weights(48)
    return w if request.param == "float32" else w.to(BF16).float()


def their_args(fmt: QuantFormat) -> QuantizationArgs:
    return QuantizationArgs(**fmt.scheme())


def their_params(fmt: QuantFormat, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale in float32 (or powers of two), zero point and global scale, as their observers would compute them."""
    args = their_args(fmt)
    if isinstance(fmt, IntFormat | FP8):
        args.scale_dtype = fmt.dtype  # rounds the scale before it is used, as a reader of the checkpoint will see it
    groups = their_groups(fmt, w)
    divisor = generate_gparam(w.min(), w.max()) if fmt.has_global_scale else None
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    return scale, None if args.symmetric else zero_point, divisor


def their_groups(fmt: QuantFormat, w: Tensor) -> Tensor:
    """The weights under each scale, along the last dimension."""
    if group_setting(fmt) == "tensor" or (isinstance(fmt, FP8) and fmt.granularity == "tensor"):
        return w.flatten()[None]
    if isinstance(fmt, FP8) and fmt.granularity == "block":
        blocks = maybe_pad_tensor_for_block_quant(w, (128, 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        return blocks.transpose(1, 2).flatten(-2)  # [row blocks, column blocks, 128 * 128]
    return w.unflatten(-1, (-1, fmt.group_size or w.shape[-1]))


def their_codes(fmt: QuantFormat, w: Tensor) -> Tensor:
    """Their rounded values on the unscaled grid: integers, or float values with the sign of zero kept."""
    scale, zero_point, divisor = their_params(fmt, w)
    return quantize(w, scale, zero_point, their_args(fmt), global_scale=divisor)


def state(fmt: QuantFormat, w: Tensor) -> dict[str, Tensor]:
    scale, zero_point, divisor = their_params(fmt, w)
    stored = {"weight": w, "weight_scale": scale.to(fmt.dtype) if isinstance(fmt, IntFormat | FP8) else scale}
    if zero_point is not None:
        stored["weight_zero_point"] = zero_point
    return stored if divisor is None else {**stored, "weight_global_scale": divisor}


def compressor_of(fmt: QuantFormat) -> tuple[type[BaseCompressor], QuantizationScheme]:
    scheme = QuantizationScheme(targets=["Linear"], weights=their_args(fmt), format=fmt.container)
    return BaseCompressor.get_value_from_registry(fmt.container), scheme


def ours(fmt: QuantFormat, w: Tensor) -> tuple[Tensor, QParams, PackedTensor]:
    q = fmt.fit(w)
    codes = fmt.encode(w, q)
    return codes, q, fmt.pack(codes, q)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_scales(fmt: QuantFormat, weights: Tensor) -> None:
    q = fmt.fit(weights)
    scale, zero_point, divisor = their_params(fmt, weights)
    if zero_point is None:
        assert q.zero_point is None
    else:
        assert q.zero_point is not None
        assert (q.zero_point.dtype, q.zero_point.shape) == (torch.int8, zero_point.shape)
        assert torch.equal(q.zero_point, zero_point)
    mine = torch.exp2(q.scale.double() - 127).float() if isinstance(fmt, MXFP4 | MXFP8) else q.scale.float()
    assert torch.equal(mine, scale)
    if divisor is None:
        assert q.global_scale is None
    else:
        assert torch.equal(q.global_scale, divisor)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_codes(fmt: QuantFormat, weights: Tensor) -> None:
    codes, _, _ = ours(fmt, weights)
    theirs = their_codes(fmt, weights)
    if isinstance(fmt, IntFormat):
        assert torch.equal(codes.float() - 2 ** (fmt.bits - 1), theirs)
        return
    eight = fmt.bits == 8
    values = codes.view(torch.float8_e4m3fn).float() if eight else torch.tensor(E2M1_VALUES)[codes.long()]
    assert torch.equal(values, theirs)
    assert torch.equal(values.signbit(), theirs.signbit())
    assert (codes == (128 if eight else 8)).any(), "no negative weight rounded to zero: the test lost its point"


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_bytes_of_their_packers(fmt: QuantFormat, weights: Tensor) -> None:
    _, _, packed = ours(fmt, weights)
    theirs = their_codes(fmt, weights)
    if isinstance(fmt, IntFormat):
        signed = theirs.to(torch.int8)
        if isinstance(fmt, IntBytes):
            assert torch.equal(packed.tensors["weight"], signed)
            return
        assert torch.equal(packed.tensors["weight_packed"], pack_to_int32(signed, fmt.bits))
        assert torch.equal(unpack_from_int32(packed.tensors["weight_packed"], fmt.bits, weights.shape), signed)
    elif fmt.bits == 8:
        assert torch.equal(packed.tensors["weight"].view(torch.uint8), theirs.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        assert torch.equal(packed.tensors["weight_packed"], pack_fp4_to_uint8(theirs))


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_tensors_of_their_compressor(fmt: QuantFormat, weights: Tensor) -> None:
    _, _, packed = ours(fmt, weights)
    compressor, scheme = compressor_of(fmt)
    theirs = compressor.compress(state(fmt, weights), scheme)
    assert theirs.keys() == packed.tensors.keys()
    for suffix, tensor in theirs.items():
        mine = packed.tensors[suffix]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), suffix
        # Flat: their transposed matrices of one column have strides that no other dtype can view.
        assert torch.equal(mine.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), suffix


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_dense_values_of_their_compressor(fmt: QuantFormat, weights: Tensor) -> None:
    """They decompress to the scale's dtype, and where scales are no floats of 16 bits or more to bf16; cast once."""
    codes, q, packed = ours(fmt, weights)
    compressor, scheme = compressor_of(fmt)
    dense = compressor.decompress(dict(packed.tensors), scheme)["weight"]
    assert dense.dtype == (fmt.dtype if isinstance(fmt, IntFormat | FP8) else BF16)
    assert torch.equal(fmt.decode(codes, q).to(dense.dtype), dense)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_dense_values_in_float32(fmt: QuantFormat, weights: Tensor) -> None:
    codes, q, _ = ours(fmt, weights)
    scale, zero_point, divisor = their_params(fmt, weights)
    theirs = dequantize(
        their_codes(fmt, weights), scale, zero_point, their_args(fmt), dtype=torch.float32, global_scale=divisor
    )
    assert torch.equal(fmt.decode(codes, q), theirs)


def nasty_magnitudes() -> Iterator[Tensor]:
    """Every float32 exponent with mantissas around the 1.75 threshold, subnormals and zero."""
    threshold = 0x600000  # mantissa bits of 1.75
    for mantissa in (0, 1, threshold - 1, threshold, threshold + 1, 0x7FFFFF):
        yield (torch.arange(255, dtype=torch.int32) << 23 | mantissa).view(torch.float32)
    yield torch.rand(4096, generator=torch.Generator().manual_seed(3)) * 8


@pytest.mark.parametrize(("fmt", "largest", "top"), [(MXFP4(), 252, 7), (MXFP8(), 246, 126)], ids=["mxfp4", "mxfp8"])
def test_mx_exponents_at_every_threshold(fmt: MXFP4 | MXFP8, largest: int, top: int) -> None:
    magnitudes = torch.cat(list(nasty_magnitudes()))
    # They would store scales that overflow float32 for the last binade.
    theirs = generate_mx_scales(magnitudes, fmt.bits).clamp(0, largest)
    w = torch.zeros(len(magnitudes), 32)
    w[:, 5] = -magnitudes
    q = fmt.fit(w)
    assert torch.equal(q.scale.flatten().float(), theirs)
    assert torch.isfinite(fmt.decode(torch.full(w.shape, top, dtype=torch.uint8), q)).all()


def test_nvfp4_shares_one_divisor_over_fused_layers(weights: Tensor) -> None:
    fmt = NVFP4()
    members = (weights[:16], weights[16:] * 3)
    shared = fmt.fit_global(members)
    joint = torch.cat(members)
    assert torch.equal(shared, generate_gparam(joint.min(), joint.max()))
    for member in members:
        q = fmt.fit(member, shared)
        groups = member.unflatten(-1, (-1, 16))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), their_args(fmt), global_scale=shared)
        assert torch.equal(q.scale.float(), scale)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-36, 1e-30, 1e30, 1e38])
def test_nvfp4_divisor_at_the_ends_of_float32(magnitude: float) -> None:
    w = torch.full((2, 16), magnitude)
    assert torch.equal(NVFP4().fit_global([w]), generate_gparam(w.min(), w.max()))


def test_nvfp4_reaches_every_fp8_neighbour() -> None:
    """Moving by one code is the next FP8 number, whatever the binade, and stays positive and finite."""
    fmt = NVFP4()
    finite = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    q = QParams(finite.to(torch.float8_e4m3fn)[None], global_scale=torch.ones(1))
    first, *others = (candidate.scale.float()[0] for candidate in fmt.scale_candidates(q))
    assert torch.equal(first, finite)
    steps = {int((other[60:61].to(torch.float8_e4m3fn).view(torch.uint8).int() - 61).item()) for other in others}
    assert steps == set(range(-8, 4)) - {0}
    for other in others:
        assert torch.isin(other, finite).all()


def test_nvfp4_global_scales_searched_span_less_than_one_binade() -> None:
    given = torch.tensor([1234.5])
    starts = NVFP4().starts(torch.ones(1, 16), given)
    first, *others = (float(q.global_scale) for q in starts if q.global_scale is not None)
    assert first == 1234.5
    assert len(others) == len(set(others)) >= 6
    assert all(0.5 < other / first < 1 for other in others)


def test_mxfp4_candidates_never_reach_nan_or_overflow() -> None:
    q = QParams(torch.arange(253, dtype=torch.uint8)[None])
    steps = [candidate.scale.int()[0] - q.scale.int()[0] for candidate in MXFP4().scale_candidates(q)]
    assert [int(step[100]) for step in steps] == [0, -1, 1, -2]
    assert all((q.scale.int()[0] + step).max() <= 252 and (q.scale.int()[0] + step).min() >= 0 for step in steps)


def lopsided_weights() -> Tensor:
    """Weights `[40, 192]` with groups of one sign, shifted, constant, underflowing, or with one outlier."""
    w = uneven_weights(40)
    w[0] = w[0].abs()
    w[1] = -w[1].abs()
    w[2] += 0.05
    w[4] = 3.25
    w[5] = -1e-3
    w[6, :64] = 1e-42  # the range over the number of steps underflows to zero, or nearly
    w[6, 64:128] = -1e-45
    w[8, 70] = -7.5  # one outlier: most codes mean nothing
    return w


@pytest.mark.parametrize("fmt", ASYMMETRIC, ids=label)
def test_lopsided_groups(fmt: IntFormat) -> None:
    w = lopsided_weights()
    codes, q, packed = ours(fmt, w)
    scale, zero_point, _ = their_params(fmt, w)
    assert torch.equal(q.scale.float(), scale)
    assert torch.equal(q.zero_point, zero_point)
    assert torch.equal(codes.float() - fmt.zero_code, their_codes(fmt, w))
    theirs = BaseCompressor.get_value_from_registry(fmt.container).compress(state(fmt, w), compressor_of(fmt)[1])
    assert torch.equal(packed.tensors["weight_zero_point"], theirs["weight_zero_point"])
    if not fmt.per_tensor:
        assert (q.zero_point[0] == -fmt.zero_code).all(), "weights of one sign have the zero point at the end"
        assert (q.zero_point[1] == fmt.zero_code - 1).all()
        assert (codes[4] == 2**fmt.bits - 1).all(), "a constant group lies at the end of its range"


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_go_to_even_codes_after_the_zero_point(bits: int) -> None:
    """Rounding before adding the zero point would give the other neighbour wherever the zero point is odd."""
    fmt = IntFormat(bits, 64, torch.float32, symmetric=False)
    n = 2**bits
    places = (torch.arange(64) % (n - 1) + 0.5).repeat(n, 1)  # halfway between neighbours, counted from the lowest
    zero_point = (torch.arange(n) - n // 2).to(torch.int8)[:, None]  # every one there is
    w = places - zero_point.float() - n // 2
    q = QParams(torch.ones(n, 1), zero_point)
    codes = fmt.encode(w, q)
    assert torch.equal(codes.float() - n // 2, quantize(w, q.scale, zero_point, their_args(fmt)))
    assert torch.equal(fmt.snap(w[:, None].clone(), q).flatten(1), fmt.decode(codes, q))
    assert not (codes % 2).any()


def test_min_max_by_hand() -> None:
    """4 bits over -0.52 ... 0.7: a step of 1.22 / 15, and zero at code 6, which is -2 counted from the middle."""
    fmt = IntFormat(4, None, torch.float32, symmetric=False)
    q = fmt.fit(w := torch.tensor([[0.7, -0.3, 0.11, -0.52]]))
    assert q.scale.item() == pytest.approx(1.22 / 15, rel=1e-6)
    assert q.zero_point.tolist() == [[-2]]
    assert fmt.encode(w, q).tolist() == [[15, 2, 7, 0]]
    assert fmt.decode(fmt.encode(w, q), q)[0].tolist() == pytest.approx(
        [0.732, -0.3253333, 0.0813333, -0.488], rel=1e-5
    )
    assert fmt.reach(q)[0].tolist() == [[[-6.5]]]
    assert fmt.reach(q)[1].tolist() == [[[9.5]]]


def test_zero_points_are_packed_along_the_outputs() -> None:
    """Eight rows to a word, the first in the lowest bits: -8 ... -1 are the nibbles 0 ... 7."""
    fmt = IntFormat(4, 2, torch.float32, symmetric=False)
    zero_point = (torch.arange(9, dtype=torch.int8) - 8)[:, None]
    packed = fmt.pack(torch.zeros(9, 2, dtype=torch.uint8), QParams(torch.ones(9, 1), zero_point))
    assert packed.tensors["weight_zero_point"].tolist() == [[0x76543210], [0x8]]


@pytest.mark.parametrize(
    "fmt",
    [
        IntFormat(4, 64, BF16),
        IntFormat(4, 64, BF16, symmetric=False),
        NVFP4(),
        MXFP4(),
        FP8("channel", BF16),
        FP8("block", BF16),
        MXFP8(),
    ],
    ids=label,
)
def test_damaged_tensors_are_refused_by_name(fmt: QuantFormat, weights: Tensor) -> None:
    _, _, packed = ours(fmt, weights)
    tensors = packed.tensors
    wrong = [
        {suffix: t for suffix, t in tensors.items() if suffix != "weight_scale"},
        {**tensors, "weight_zero_point": tensors["weight_scale"]},
        {**tensors, "weight_scale": tensors["weight_scale"][:, :-1]},
        {**tensors, "weight_scale": tensors["weight_scale"].double()},
        {**tensors, (codes := next(iter(tensors))): tensors[codes][:-1]},
    ]
    for damaged in wrong:
        with pytest.raises(CheckpointError, match=r"weight(_scale|_zero_point|_packed)?\b"):
            fmt.unpack(PackedTensor(packed.format, packed.shape, damaged))
    with pytest.raises(CheckpointError, match="int3"):
        IntFormat(3, 64, BF16).unpack(packed)
    rows = len(weights)
    with pytest.raises(CheckpointError, match="for a matrix" if isinstance(fmt, FP8) else "do not divide"):
        fmt.unpack(PackedTensor(packed.format, (rows, 193), tensors))


def test_a_stored_shape_of_another_matrix_is_refused(weights: Tensor) -> None:
    fmt = IntFormat(4, 64, BF16)
    _, _, packed = ours(fmt, weights)
    other = {**packed.tensors, "weight_shape": torch.tensor([48, 191])}
    with pytest.raises(CheckpointError, match=r"weight_shape says \[48, 191\]"):
        fmt.unpack(PackedTensor(packed.format, packed.shape, other))
