"""Packing by the kernel is that of the references, for any shape, width and order of memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import coders, ops, references
from qcompiler.runtime.kernels import packing


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from(["plain", "turned", "sliced"]),
    st.integers(0, 2**32),
)
def test_bytes_and_codes(shape, bits, signed, order, seed):
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) if signed else 2**bits
    codes = torch.randint(1 - most if signed and bits > 1 else 0, max(most, 1), shape, generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    if order == "turned":
        codes = codes.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "sliced":
        codes = torch.stack([codes, codes], -1)[..., 0]
    packed, expected = coders.pack_codes(codes, bits), references.pack(codes, bits)
    assert torch.equal(packed, expected)
    if bits > 1:
        found = coders.unpack_codes(packed, shape, bits, signed)
        assert torch.equal(found, codes)
        assert found.dtype is codes.dtype
        torch.library.opcheck(ops.UNPACK_CODES, (packed, shape, bits, signed), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("shape", "bits", "reason"),
    [
        ([4, 3], 4, ""),
        ([3, 4], 2, ""),
        ([3, 5], 4, "no dimension of [3, 5] divides evenly"),
        ([8, 8], 1, "the kernel packs codes of 2 to 4 bits, got 1"),
        ([8, 8], 8, "the kernel packs codes of 2 to 4 bits, got 8"),
        ([0, 3], 4, "no dimension of [0, 3] divides evenly"),
    ],
)
def test_what_is_packed(shape, bits, reason):
    assert packing.explain_packing(shape, bits) == reason


def test_without_a_compiler_the_references_pack(monkeypatch):
    monkeypatch.setattr(packing, "load_library", lambda name: "no compiler")
    codes = torch.randint(-7, 8, (4, 6), dtype=torch.int8)
    packed = coders.pack_codes(codes, 4)
    assert packing.pack(codes, 4, packed) == "no compiler"
    assert torch.equal(packed, references.pack(codes, 4))
    assert torch.equal(coders.unpack_codes(packed, [4, 6], 4, True), codes)
