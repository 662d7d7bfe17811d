"""Sums whose scales change on the way: kernel and reference against a slow oracle, bit for bit, and what is refused."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops
from qcompiler.runtime.kernels import runs
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format

#: test_triton.py runs this file so; Python runs every operation of a program of Triton, and no run is below 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROPERTY = settings(derandomize=True, deadline=None, max_examples=25 if INTERPRETED else 150)
RUN_LENGTHS = [32, 48, 64, 128, 512] if INTERPRETED else [1, 3, 4, 31, 32, 48, 64, 128, 512]
#: half of the distance between 1 and the next float32
UNIT = 2.0**-24
FACTS = Facts(
    device="cpu", formats=(parse_format("int8"), parse_format("int8")), rows=64, length=64, columns=64, run=32
)
REASON = runs.RUNS.explain(FACTS)
KERNELS = ["", pytest.param("runs", marks=pytest.mark.skipif(bool(REASON), reason=REASON))]
KERNELS += ["triton-runs"] * INTERPRETED


@dataclasses.dataclass
class Side:
    """One operand, [outer, length], with a factor for every `edge` rows and `run` elements."""

    codes: torch.Tensor
    factors: torch.Tensor
    edge: int

    @classmethod
    def draw(cls, outer, length, edge, run, seed):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-128, 128, (outer, length), generator=generator, dtype=torch.int8)
        return cls(codes, torch.rand(-(-outer // edge), -(-length // run), generator=generator) + 0.1, edge)

    def rows(self):
        """Factors of every row, as float32 of numpy."""
        return self.factors.numpy()[np.arange(len(self.codes)) // self.edge]


def multiply(a, b, run, kernel, orders=(False, False)):
    """The operator; an order turns the memory of an operand, not the numbers."""
    left, right = (turn(side.codes, order) for side, order in zip((a, b), orders, strict=True))
    return ops.MULTIPLY_RUNS(left, a.factors, a.edge, right.t(), b.factors, b.edge, run, kernel)


def turn(matrix, order):
    return matrix.t().contiguous().t() if order else matrix


def expected(a, b, run):
    """One run after the other: an exact sum, two float32 products and a float32 sum."""
    left, right = a.codes.numpy().astype(np.int64), b.codes.numpy().astype(np.int64)
    result = np.zeros((len(left), len(right)), np.float32)
    for index in range(-(-left.shape[1] // run)):
        place = slice(index * run, (index + 1) * run)
        factors = a.rows()[:, None, index] * b.rows()[None, :, index]
        result = result + (left[:, place] @ right[:, place].T).astype(np.float32) * factors
    assert result.dtype == np.float32
    return torch.from_numpy(result)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    *(st.integers(1, 70),) * 2,
    st.integers(1, 300),
    *(st.integers(1, 45),) * 2,
    st.sampled_from(RUN_LENGTHS),
    *(st.booleans(),) * 2,
    st.integers(0, 2**32),
)
@PROPERTY
def test_bit_for_bit_in_every_shape(kernel, rows, columns, length, a_edge, b_edge, run, left, right, seed):
    """Single rows, odd extents, last blocks and runs that are shorter, blocks above the extent, both memory orders."""
    a, b = Side.draw(rows, length, a_edge, run, seed), Side.draw(columns, length, b_edge, run, seed + 1)
    assert torch.equal(multiply(a, b, run, kernel, (left, right)), expected(a, b, run))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(130, 2100, 50, 32), (9, 2100, 40, 2048), (70, 70, 800, 64)])
def test_more_than_one_task(kernel, shape):
    """Above 64 rows, 768 columns, and 1024 elements of a sum or a run beyond that."""
    rows, length, columns, run = shape
    a, b = Side.draw(rows, length, 32, run, 0), Side.draw(columns, length, 32, run, 1)
    assert torch.equal(multiply(a, b, run, kernel), expected(a, b, run))


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(kernel):
    """Every second column of every third row."""
    a, b = Side.draw(20, 70, 4, 32, 0), Side.draw(18, 70, 4, 32, 1)
    wide = torch.zeros(60, 140, dtype=torch.int8)
    wide[::3, ::2] = a.codes
    strided = dataclasses.replace(a, codes=wide[::3, ::2])
    assert torch.equal(multiply(strided, b, 32, kernel), expected(a, b, 32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("left", [-128, 127])
@pytest.mark.parametrize("right", [-128, 127])
def test_extreme_codes_in_the_longest_run(kernel, left, right):
    """Nothing saturates on the way: 131,071 products of 2^14 fill int32."""
    length = (2**31 - 1) // 128**2
    a, b = (Side(torch.full((2, length), code, dtype=torch.int8), torch.ones(1, 1), 2) for code in (left, right))
    exact = torch.full((2, 2), length * left * right, dtype=torch.int64)
    assert torch.equal(multiply(a, b, length, kernel), exact.to(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_powers_of_two_are_exact(kernel):
    """Float32 holds every partial sum: 256·2^14 products in steps of 2^-6·2^-6 … 2^0."""
    a, b = Side.draw(9, 256, 4, 32, 0), Side.draw(40, 256, 16, 32, 1)
    for side, seed in ((a, 2), (b, 3)):
        exponents = torch.randint(-1, 1, side.factors.shape, generator=torch.Generator().manual_seed(seed))
        side.factors = 2.0**exponents
    exact = sum_in_float64(a, b, 32)
    assert torch.equal(multiply(a, b, 32, kernel).double(), exact)


def sum_in_float64(a, b, run):
    """Σ code · factor · code · factor: exact, or within the 53 bits of float64."""
    floats = [
        side.codes.double() * torch.from_numpy(side.rows()).double().repeat_interleave(run, 1)[:, : side.codes.shape[1]]
        for side in (a, b)
    ]
    return floats[0] @ floats[1].t()


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**32))
@PROPERTY
def test_the_bound_of_the_roundings(kernel, rows, columns, length, seed):
    """A term has 3 roundings: the sum of a run (none below 1,025 products), the factor, the product; then as many sums
    as runs. So each term is off by (runs + 2) units of its own magnitude."""
    a, b = Side.draw(rows, length, 8, 32, seed), Side.draw(columns, length, 8, 32, seed + 1)
    magnitudes = [dataclasses.replace(side, codes=side.codes.to(torch.int16).abs()) for side in (a, b)]
    bound = (-(-length // 32) + 2) * UNIT * (1 + 2**-10) * sum_in_float64(*magnitudes, 32)
    assert ((multiply(a, b, 32, kernel).double() - sum_in_float64(a, b, 32)).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_that_is_not_finite(kernel):
    """NaN throughout its rows or columns, whatever the codes are, and nowhere else."""
    a, b = Side.draw(24, 96, 8, 32, 0), Side.draw(40, 96, 4, 32, 1)
    a.codes[8:16] = 0
    a.factors[1, 2] = torch.nan
    b.factors[3, 0] = torch.nan
    wanted = torch.zeros(24, 40, dtype=torch.bool)
    wanted[8:16], wanted[:, 12:16] = True, True
    found = multiply(a, b, 32, kernel)
    assert torch.equal(found.isnan(), wanted)
    assert torch.equal(found[~wanted], expected(a, b, 32)[~wanted])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exponents", [(-126, -10), (-126, -126), (-126, 127), (60, 60)])
def test_extreme_factors(kernel, exponents):
    """Subnormal factors are not flushed; factors below 2^-149 vanish, and results above 2^128 are infinite."""
    a, b = Side.draw(3, 64, 3, 32, 0), Side.draw(5, 64, 5, 32, 1)
    for side, exponent in zip((a, b), exponents, strict=True):
        side.codes, side.factors = side.codes.clamp(min=1), torch.full_like(side.factors, 2.0**exponent)
    with np.errstate(over="ignore"):
        wanted = expected(a, b, 32)
    assert torch.equal(multiply(a, b, 32, kernel), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_products(kernel, shape):
    rows, length, columns = shape
    a, b = Side.draw(rows, length, 2, 32, 0), Side.draw(columns, length, 2, 32, 1)
    assert torch.equal(multiply(a, b, 32, kernel), torch.zeros(rows, columns))


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_do_not_change_a_bit(kernel):
    a, b = Side.draw(150, 300, 32, 32, 0), Side.draw(1000, 300, 32, 32, 1)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(multiply(a, b, 32, kernel))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_schema_and_shape():
    a, b = Side.draw(4, 40, 2, 32, 0), Side.draw(6, 40, 2, 32, 1)
    given = (a.codes, a.factors, 2, b.codes.t(), b.factors, 2, 32, "")
    torch.library.opcheck(ops.MULTIPLY_RUNS, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"run": 31},
            "a scale changes after every 31 elements of a sum; valid: 32 or more, as in hyperblock",
        ),
        ({"formats": (parse_format("int8"), parse_format("affine8"))}, "takes signed integers, got affine8"),
        ({"formats": (parse_format("uint4"), parse_format("int8"))}, "takes signed integers, got uint4"),
    ],
)
def test_what_the_kernel_refuses(change, reason):
    assert reason in runs.RUNS.explain(dataclasses.replace(FACTS, **change))


@pytest.mark.parametrize("is_wide", [False, True])
def test_small_products_are_as_fast_in_float(is_wide, monkeypatch):
    monkeypatch.setattr(runs, "has_wide_vectors", lambda: is_wide)
    least = 524288 if is_wide else 8388608
    assert runs.RUNS.weigh(dataclasses.replace(FACTS, rows=least // 64**2)) == ""
    assert runs.RUNS.weigh(dataclasses.replace(FACTS, rows=least // 64**2 - 1)) == (
        f"float is as fast for {least - 64**2} products; valid: {least} or more"
    )


@pytest.mark.parametrize("missing", ["no compiler", "no instructions"])
def test_without_the_library(missing, monkeypatch):
    monkeypatch.setattr(runs, "explain_vectors", lambda: missing)
    runs._load_kernel.cache_clear()
    a = Side.draw(4, 64, 2, 32, 0)
    with pytest.raises(RuntimeError, match=missing):
        multiply(a, a, 32, "runs")
    runs._load_kernel.cache_clear()
    assert runs.RUNS.explain(FACTS) == missing
