"""Integer formats: which codes they have, how they are stored, and their names."""

import dataclasses

import pytest
import torch

from qcompiler.runtime.numbers.formats import BITS, IntFormat, Kind, parse_format

ALL = [IntFormat(bits, kind) for bits in BITS for kind in Kind]


@pytest.mark.parametrize(
    ("name", "qmin", "qmax", "magnitude_bits", "dtype"),
    [
        ("int2", -1, 1, 1, torch.int8),
        ("int3", -3, 3, 2, torch.int8),
        ("int4", -7, 7, 3, torch.int8),
        ("int5", -15, 15, 4, torch.int8),
        ("int6", -31, 31, 5, torch.int8),
        ("int7", -63, 63, 6, torch.int8),
        ("int8", -127, 127, 7, torch.int8),
        ("int16", -32767, 32767, 15, torch.int16),
        ("uint2", 0, 3, 2, torch.uint8),
        ("uint3", 0, 7, 3, torch.uint8),
        ("uint4", 0, 15, 4, torch.uint8),
        ("uint8", 0, 255, 8, torch.uint8),
        ("uint16", 0, 65535, 16, torch.uint16),
        ("affine2", 0, 3, 2, torch.uint8),
        ("affine4", 0, 15, 4, torch.uint8),
        ("affine8", 0, 255, 8, torch.uint8),
        ("affine16", 0, 65535, 16, torch.uint16),
    ],
)
def test_levels_and_storage(name: str, qmin: int, qmax: int, magnitude_bits: int, dtype: torch.dtype) -> None:
    form = parse_format(name)
    assert (form.qmin, form.qmax, form.magnitude_bits, form.dtype) == (qmin, qmax, magnitude_bits, dtype)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_every_code_is_stored_exactly_and_zero_is_one(form: IntFormat) -> None:
    codes = torch.arange(form.qmin, form.qmax + 1)
    assert torch.equal(codes.to(form.dtype).to(torch.int64), codes)
    assert form.qmin <= 0 <= form.qmax
    # a signed format leaves out −2^(b−1), so it has one level less
    assert len(codes) == 2**form.bits - (form.kind is Kind.SIGNED)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_text_round_trip(form: IntFormat) -> None:
    assert parse_format(str(form)) == form


def test_texts_are_distinct_and_the_documented_ones() -> None:
    assert len({str(form) for form in ALL}) == len(ALL) == len(BITS) * 3
    assert [str(IntFormat(8, kind)) for kind in Kind] == ["int8", "uint8", "affine8"]
    assert str(IntFormat(4)) == "int4"


@pytest.mark.parametrize("text", ["", "int", "8", "int-8", "int 8", "int8 ", "sint8", "INT8", "int8x", "uint8:fit"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^number format: got '{text}'; valid: int, uint or affine followed"):
        parse_format(text)


@pytest.mark.parametrize("bits", [bits for bits in range(-1, 34) if bits not in BITS])
def test_bits_refused(bits: int) -> None:
    valid = ", ".join(map(str, BITS))
    with pytest.raises(ValueError, match=f"^integer format: {bits} bits are not supported; valid: {valid}$"):
        IntFormat(bits)


@pytest.mark.parametrize("text", ["int1", "uint33", "affine64"])
def test_parse_refuses_bits(text: str) -> None:
    with pytest.raises(ValueError, match=r"bits are not supported; valid: 2, 3, 4"):
        parse_format(text)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        IntFormat(8).bits = 4  # type: ignore[misc]
