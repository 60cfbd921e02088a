"""Dense bit packing: codes of 1 to 8 bits as little-endian int32 words, and 4-bit codes as byte pairs.

The layout is the one of compressed-tensors' `pack-quantized`: code `i` of a row fills bits `[i*b, i*b+b)` of a
least-significant-bit-first stream, spilling over word ends; rows are padded with zero bits to a whole word.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import NumericalError, UnsupportedError
from compressor.formats.base import grouped

_LANES = 8  # eight codes of b bits are exactly b bytes and fit an int64 for every width


def packed_words(in_features: int, bits: int) -> int:
    """Return the int32 words one row of `in_features` codes takes."""
    return -(-in_features * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[out, in]` into int32 words `[out, ceil(in*bits/32)]`.

    Raises:
        NumericalError: A code does not fit in `bits` bits.
    """
    _require_little_endian()
    _require_width(codes, bits)
    columns = codes.shape[1]
    lanes = grouped(F.pad(codes, (0, -columns % _LANES)), _LANES)  # [out, blocks, 8]
    stream = lanes[..., 0].to(torch.int64)  # [out, blocks]
    for lane in range(1, _LANES):  # lane by lane: an int64 copy of all codes would be eight times their size
        stream |= lanes[..., lane].to(torch.int64) << (lane * bits)
    raw = _resized(stream.unsqueeze(-1).view(torch.uint8), bits).flatten(1)  # [out, blocks*bits] bytes
    return _resized(raw, 4 * packed_words(columns, bits)).view(torch.int32)


def unpack_bits(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the uint8 codes `[out, in_features]` packed into int32 `words`; the inverse of `pack_bits`."""
    _require_little_endian()
    raw = words.contiguous().view(torch.uint8)
    if bits == 8:
        return raw[:, :in_features].contiguous()
    if bits == 4:
        return unpack_nibbles(raw, in_features)
    raw = grouped(_resized(raw, -(-in_features // _LANES) * bits), bits)  # [out, blocks, bits] bytes
    stream = raw[..., 0].to(torch.int64)  # [out, blocks]
    for byte in range(1, bits):
        stream |= raw[..., byte].to(torch.int64) << (8 * byte)
    # Halve the runs of codes that lie together until each has a byte of its own, all words at once.
    for codes, width in ((4, 32), (2, 16), (1, 8)):
        low = sum(((1 << codes * bits) - 1) << place for place in range(0, 64, 2 * width))
        moved = (stream << (width - codes * bits)).bitwise_and_(low << width)
        stream = stream.bitwise_and_(low).bitwise_or_(moved)
    return stream.unsqueeze(-1).view(torch.uint8).flatten(1)[:, :in_features].contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, uint8 `[out, in]`, two per byte: uint8 `[out, ceil(in/2)]`, even column in the low nibble.

    Raises:
        NumericalError: A code does not fit in 4 bits.
    """
    _require_width(codes, 4)
    pairs = F.pad(codes, (0, codes.shape[1] % 2))
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """Return the uint8 codes `[out, in_features]` of byte pairs; the inverse of `pack_nibbles`."""
    _require_little_endian()
    # Both nibbles of a byte at once, as the two bytes of an int16: several times faster than stacking them.
    wide = packed.to(torch.int16)
    pairs = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F)
    codes = pairs.view(-1).view(torch.uint8).view(len(packed), -1)
    return codes[:, :in_features].contiguous()


def _resized(raw: Tensor, width: int) -> Tensor:
    """Return a copy of `raw` whose last dimension is cut, or filled with zeros, to `width`.

    Always a fresh tensor: a single row may count as contiguous with a row stride no wider dtype can view.
    """
    resized = raw.new_zeros(*raw.shape[:-1], width)
    common = min(width, raw.shape[-1])
    resized[..., :common] = raw[..., :common]
    return resized


def _require_width(codes: Tensor, bits: int) -> None:
    """Refuse codes that would spill into their neighbours."""
    largest = int(codes.max()) if codes.numel() else 0
    if largest >> bits:
        raise NumericalError(
            f"code {largest} does not fit in {bits} bits (at most {(1 << bits) - 1})",
            "the method that chose the codes is at fault: encode with the same format that packs",
        )


def _require_little_endian() -> None:
    """Refuse hosts whose integers lie in memory in another byte order than on disk."""
    if sys.byteorder != "little":
        raise UnsupportedError("bit packing needs a little-endian host", "run on x86-64 or arm64")
