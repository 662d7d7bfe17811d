"""Packing of short codes: every width, type and shape comes back, and the bytes are the documented ones."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.numbers.packing import pack_codes, packed_dim, per_byte, unpack_codes

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
DTYPES = {"signed": torch.int8, "unsigned": torch.uint8, "mask": torch.bool}


@st.composite
def coded(draw: Callable[..., Any]) -> tuple[torch.Tensor, int, bool]:
    """(codes over their whole range in a random memory order, bits, signed)."""
    kind, shape = draw(st.sampled_from(list(DTYPES))), draw(SHAPES)
    bits = 1 if kind == "mask" else draw(st.integers(2, 8))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind == "signed" else (0, 2**bits)
    order = draw(st.permutations(range(len(shape))))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = torch.from_numpy(random.integers(low, high, [shape[dim] for dim in order])).to(DTYPES[kind])
    return codes.permute([order.index(dim) for dim in range(len(shape))]), bits, kind == "signed"


@given(coded())
@PROPERTY
def test_round_trip(case: tuple[torch.Tensor, int, bool]) -> None:
    codes, bits, signed = case
    back = unpack_codes(pack_codes(codes, bits), tuple(codes.shape), bits, signed)
    assert back.dtype == (torch.bool if bits == 1 else torch.int32)
    assert back.shape == codes.shape
    assert torch.equal(back, codes.to(back.dtype))


@given(coded())
@PROPERTY
def test_bytes(oracle: ModuleType, case: tuple[torch.Tensor, int, bool]) -> None:
    codes, bits, _ = case
    packed, dim = oracle.pack(codes.contiguous().numpy(), bits)
    assert packed_dim(tuple(codes.shape), bits) == dim
    assert oracle.same(pack_codes(codes, bits).contiguous().numpy(), packed)


@pytest.mark.parametrize(("bits", "count"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1), (6, 1), (7, 1), (8, 1)])
def test_every_code_in_every_place_of_a_byte(bits: int, count: int) -> None:
    assert per_byte(bits) == count
    codes = torch.cartesian_prod(*[torch.arange(2**bits, dtype=torch.uint8)] * count).reshape(-1, count)
    packed = pack_codes(codes.t(), bits)
    assert torch.equal(unpack_codes(packed, (count, len(codes)), bits, False).to(torch.uint8), codes.t())
    assert packed.numel() == len(codes)
    assert len(packed.unique()) == len(codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        (torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4, [0x31, 0x42]),  # element 0 with element 0 + 2
        (torch.tensor([-1, -7, 7, 0], dtype=torch.int8), 4, [0x7F, 0x09]),
        (torch.tensor([1, -1, 0, -1], dtype=torch.int8), 2, [0b11_00_11_01]),
        (torch.tensor([3, -3], dtype=torch.int8), 3, [0xD3]),
        (torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool), 1, [0b11000001]),
        (torch.tensor([-127, 127], dtype=torch.int8), 8, [0x81, 0x7F]),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), 4, [0x31, 0x02]),  # filled up with a zero
        (torch.tensor(5, dtype=torch.uint8), 4, [0x05]),
        (torch.empty(0, dtype=torch.uint8), 4, []),
    ],
)
def test_documented_bytes(codes: torch.Tensor, bits: int, expected: list[int]) -> None:
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected


@pytest.mark.parametrize(
    ("shape", "bits", "dim", "packed_shape"),
    [
        ((4, 6), 4, 0, (2, 6)),
        ((3, 6), 4, 1, (3, 3)),
        ((3, 5), 4, None, (8,)),
        ((6, 8), 2, 1, (6, 2)),
        ((0, 4), 4, 1, (0, 2)),
        ((0, 5), 4, None, (0,)),
        ((), 4, None, (1,)),
        ((3, 5), 8, 0, (3, 5)),
        ((16, 3), 1, 0, (2, 3)),
        ((9, 7), 1, None, (8,)),
    ],
)
def test_shape_of_the_packed(shape: tuple[int, ...], bits: int, dim: int | None, packed_shape: tuple[int, ...]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    assert packed_dim(shape, bits) == dim
    assert tuple(pack_codes(codes, bits).shape) == packed_shape
    assert math.prod(packed_shape) == -(-math.prod(shape) // per_byte(bits))
