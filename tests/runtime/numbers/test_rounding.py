"""The counter hash and stochastic rounding, against Python integers, and against what probability says."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.numbers.rounding import Rounding, random_bits, round_stochastic

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
INT32 = st.integers(-(2**31), 2**31 - 1)
#: bound on |z| of the z-tests: a correct hash exceeds it with p = 2·(1 − Φ(5)) = 5.7e-7 in each; the seeds are fixed
Z = 5.0


def words(key: tuple[int, int], site: str, count: int) -> np.ndarray:
    bits = random_bits(torch.tensor(key, dtype=torch.int32), site, torch.arange(count, dtype=torch.int32))
    assert bits.dtype == torch.int32
    return bits.numpy().view(np.uint32)


def unmix(word: int) -> int:
    """The inverse of lowbias32, with the constants that its author publishes for it."""
    word ^= word >> 16
    word = word * 0x43021123 % 2**32
    word ^= word >> 15 ^ word >> 30
    word = word * 0x1D69E2A5 % 2**32
    return word ^ word >> 16


@given(INT32, INT32, st.text(max_size=20), st.integers(0, 70))
@PROPERTY
def test_bits_are_the_hash(oracle: ModuleType, key0: int, key1: int, site: str, count: int) -> None:
    assert np.array_equal(words((key0, key1), site, count), oracle.random_words((key0, key1), site, count))


@given(INT32, INT32, INT32)
@PROPERTY
def test_bits_at_any_index(oracle: ModuleType, key0: int, key1: int, index: int) -> None:
    key, place = torch.tensor([key0, key1], dtype=torch.int32), torch.tensor([index], dtype=torch.int32)
    start = oracle.random_words((key0, key1), "w", 1)[0]
    got = random_bits(key, "w", place).numpy().view(np.uint32)[0]
    assert (unmix(int(got)) - unmix(int(start))) % 2**32 == index * 0x9E3779B1 % 2**32


def test_bits_depend_on_the_site_and_on_both_halves_of_the_key() -> None:
    streams = [words((1, 2), "a", 64), words((1, 2), "b", 64), words((2, 1), "a", 64), words((1, 3), "a", 64)]
    assert len({stream.tobytes() for stream in streams}) == len(streams)


@pytest.mark.parametrize("bit", range(32))
def test_each_bit_is_fair(bit: int) -> None:
    count = 2**16
    ones = int((words((7, 11), "fair", count) >> bit & 1).sum())
    assert abs(ones - count / 2) / math.sqrt(count / 4) < Z


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((7, 11), "a", 0), ((7, 11), "a", 1)),  # neighbors
        (((7, 11), "a", 0), ((7, 11), "b", 0)),  # sites
        (((7, 11), "a", 0), ((8, 11), "a", 0)),  # steps
        (((7, 11), "a", 0), ((7, 12), "a", 0)),
    ],
)
def test_streams_are_uncorrelated(one: tuple, other: tuple) -> None:
    count = 2**16
    u, v = (words(key, site, count + skip)[skip:] / 2.0**32 - 0.5 for key, site, skip in (one, other))
    # the product of two independent uniform numbers of variance 1/12 has variance 1/144
    assert abs((u * v).sum()) / math.sqrt(count / 144) < Z


@pytest.mark.parametrize("value", [0.5, 0.1, 0.999, -0.25, -0.001, 100.3, -6.7, 32766.9, 1e-3, -127.5])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    count = 2**18
    x = torch.full((count,), value)
    key, index = torch.tensor([3, 5], dtype=torch.int32), torch.arange(count, dtype=torch.int32)
    exact = float(x[0])
    fraction = exact - math.floor(exact)
    rounded = round_stochastic(x, random_bits(key, "bias", index)).double()
    assert set(rounded.tolist()) == {math.floor(exact), math.floor(exact) + 1}
    # a code is floor + Bernoulli(fraction): standard deviation of the mean √(f(1−f)/n) ≥ 6e-5, far above the 2⁻²⁴ of u
    assert abs(rounded.mean() - exact) / math.sqrt(fraction * (1 - fraction) / count) < Z


@given(st.floats(-70000, 70000, width=32), INT32)
@PROPERTY
def test_up_or_down(oracle: ModuleType, value: float, word: int) -> None:
    rounded = round_stochastic(torch.tensor([value]), torch.tensor([word], dtype=torch.int32)).numpy()
    expected = oracle.round_up_or_down(np.array([value], np.float32), np.array([word % 2**32], np.uint32))
    assert rounded[0] == expected[0]


@pytest.mark.parametrize(
    ("value", "draws"),
    [(0.5, 2**23), (-0.75, 2**22), (2.0**-24, 1), (1 - 2.0**-24, 2**24 - 1), (100.125, 2**21), (3.0, 0), (-3.0, 0)],
)
@pytest.mark.parametrize("low_bits", [0, 255])
def test_exactly_the_fraction_of_all_draws_goes_up(value: float, draws: int, low_bits: int) -> None:
    # of the 2²⁴ values of the top bits those below fraction·2²⁴ round up; the low 8 bits do not count
    tops = [top for top in (0, draws - 1, draws, 2**24 - 1) if 0 <= top < 2**24]
    bits = torch.from_numpy(np.array([top << 8 | low_bits for top in tops], np.uint32).view(np.int32))
    rounded = round_stochastic(torch.full((len(tops),), value), bits)
    assert rounded.tolist() == [math.floor(value) + (top < draws) for top in tops]


def test_names() -> None:
    assert [str(rounding) for rounding in Rounding] == ["nearest", "stochastic"]
