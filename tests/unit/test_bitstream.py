"""Packed bytes against examples done by hand and against a bit-by-bit definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import NumericalError
from compressor.formats.bitstream import pack_bits, pack_nibbles, packed_words, unpack_bits, unpack_nibbles
from compressor.formats.e2m1 import E2M1_VALUES, decode_e2m1, encode_e2m1


def unsigned(values: list[int], bits: int) -> torch.Tensor:
    return torch.tensor([[v + 2 ** (bits - 1) for v in values]], dtype=torch.uint8)


def words(packed: torch.Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in packed[0].tolist()]


def one_bit_at_a_time(row: list[int], bits: int) -> list[int]:
    stream = [code >> bit & 1 for code in row for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    return [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, [-8, -7, -1, 0, 1, 2, 6, 7], [0xFEA98710]),
        (4, [-8, -1, 0, 7, 1, 2, 3, -3], [1537865840]),
        (3, [-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, 0, 1], [0x38FAC688, 0x0000000B]),
        (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4]),
        (8, [-128, 127, 0, -1], [0x7F80FF00]),
    ],
)
def test_words_worked_out_by_hand(bits: int, values: list[int], expected: list[int]) -> None:
    packed = pack_bits(unsigned(values, bits), bits)
    assert words(packed) == expected
    assert torch.equal(unpack_bits(packed, bits, len(values)), unsigned(values, bits))


def test_int4_bytes_on_disk() -> None:
    packed = pack_bits(unsigned([-8, -7, -1, 0, 1, 2, 6, 7], 4), 4)
    assert packed.numpy().tobytes().hex() == "1087a9fe"


@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_any_codes_pack_as_defined_and_return(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_words(columns, bits))
    for row, packed_row in zip(codes.tolist(), packed.tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in packed_row] == one_bit_at_a_time(row, bits)
    assert torch.equal(unpack_bits(packed, bits, columns), codes)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), columns=st.integers(1, 33))
@settings(max_examples=50, deadline=None)
def test_nibbles_return_for_odd_and_even_widths(seed: int, rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, columns), codes)


def test_strided_words_and_codes_are_read_in_order() -> None:
    codes = torch.randint(0, 8, (24, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(pack_bits(codes.t(), 3), pack_bits(codes.t().contiguous(), 3))
    packed = pack_bits(codes.t(), 3)
    assert torch.equal(unpack_bits(packed.t().contiguous().t(), 3, 24), codes.t())
    assert torch.equal(unpack_bits(packed[4:5], 3, 24), codes.t()[4:5])


def test_codes_too_wide_are_refused() -> None:
    for pack in (lambda c: pack_bits(c, 4), pack_nibbles):
        with pytest.raises(NumericalError, match="code 16 does not fit in 4 bits"):
            pack(torch.tensor([[3, 16]], dtype=torch.uint8))


def test_e2m1_values_and_their_bytes() -> None:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert list(E2M1_VALUES) == values + [-v for v in values]
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert pack_nibbles(codes).numpy().tobytes().hex() == "1032547698badcfe"
    assert decode_e2m1(codes)[0].tolist() == values + [-v for v in values]


def test_e2m1_ties_go_to_the_even_code_and_saturate() -> None:
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 6: 6, 7: 6, 1e30: 6}
    z = torch.tensor(list(ties), dtype=torch.float32)
    assert decode_e2m1(encode_e2m1(z)).tolist() == list(ties.values())
    assert decode_e2m1(encode_e2m1(-z)).tolist() == [-v for v in ties.values()]
    assert not (encode_e2m1(z[:7]) & 1).any()


def test_e2m1_neighbours_of_every_tie_go_to_the_nearer_value() -> None:
    for low, high in ((0, 0.5), (0.5, 1), (1, 1.5), (1.5, 2), (2, 3), (3, 4), (4, 6)):
        middle = torch.tensor((low + high) / 2)
        below, above = torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(9.0))
        assert decode_e2m1(encode_e2m1(torch.stack([below, above]))).tolist() == [low, high]


def test_e2m1_zeros_have_no_sign_but_negatives_keep_theirs() -> None:
    assert encode_e2m1(torch.tensor([0.0, -0.0])).tolist() == [0, 0]
    assert encode_e2m1(torch.tensor([0.1, -0.1])).tolist() == [0, 8]
