"""The kernels of the CPU against exact sums, and what they refuse."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.kernels import cpu
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300)
EXTENTS = st.integers(2, 70)


def facts(rows, length, columns):
    formats = (parse_format("int8"), parse_format("int8"))
    return Facts(device="cpu", formats=formats, rows=rows, length=length, columns=columns)


def turned(matrix, order):
    """The same matrix in the other memory order."""
    return matrix.t().contiguous().t() if order else matrix.contiguous()


@given(EXTENTS, EXTENTS, EXTENTS, st.booleans(), st.booleans(), st.integers(0, 2**32))
@PROPERTY
def test_int_mm_is_exact_in_every_memory_order(rows, length, columns, left, right, seed):
    assert cpu.INT_MM.explain(facts(rows, length, columns)) == ""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        for shape in ((rows, length), (length, columns))
    )
    expected = (a.to(torch.int64).unsqueeze(2) * b.to(torch.int64)).sum(1)
    found = cpu.INT_MM.call(turned(a, left), turned(b, right))
    assert found.dtype is torch.int32
    assert torch.equal(found.to(torch.int64), expected)


@pytest.mark.parametrize(("left", "right"), [*itertools.product((-128, 127), repeat=2)])
def test_int_mm_does_not_saturate_on_the_way(left, right):
    """Two products of extreme codes leave 16 bits; the longest sum that 32 bits hold is exact too."""
    length = (2**31 - 1) // 128**2
    a, b = torch.full((2, length), left, dtype=torch.int8), torch.full((length, 2), right, dtype=torch.int8)
    assert cpu.INT_MM.call(a, b).tolist() == [[length * left * right] * 2] * 2


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 1, 4), (4, 4, 1), (0, 4, 4), (4, 0, 4)])
def test_int_mm_refuses_extents_below_two(shape):
    rows, length, columns = shape
    text = f"two elements along every axis, got [{rows}, {length}] × [{length}, {columns}]"
    assert text in cpu.INT_MM.explain(facts(*shape))


@pytest.mark.usefixtures("fast_integers")
def test_small_products_are_as_fast_in_float():
    assert cpu.INT_MM.weigh(facts(32, 64, 64)) == ""
    assert cpu.INT_MM.weigh(facts(32, 64, 63)) == "float is as fast for 129024 products; valid: 131072 or more"


@pytest.mark.usefixtures("fast_integers")
@pytest.mark.parametrize(("form", "least"), [("int8", 32), ("affine8", 128)])
def test_patches_pay_if_many_products_read_them(form, least):
    large = dataclasses.replace(facts(4096, 64, 64), formats=(parse_format("int8"), parse_format(form)))
    assert cpu.INT_MM.weigh(dataclasses.replace(large, reuse=least)) == ""
    text = f"float is as fast for patches that {least - 1} products read; valid: {least} or more"
    assert cpu.INT_MM.weigh(dataclasses.replace(large, reuse=least - 1)) == text


def test_a_processor_that_saturates_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "sums_are_exact", lambda: False)
    assert cpu.INT_MM.explain(facts(4, 4, 4)) == "the integer kernel of this processor saturates within a sum"


@pytest.mark.parametrize(
    ("integers", "floats", "is_wide", "is_fast"),
    [
        (0.9, 1.0, False, True),
        (3.9, 1.0, False, True),
        (4.1, 1.1, False, False),
        (3.9, 0.9, False, False),
        (77.0, 143.0, False, False),  # loops, on a busy machine
        (77.0, 1.0, True, True),
    ],
)
def test_a_processor_without_an_integer_kernel_multiplies_floats(integers, floats, is_wide, is_fast, monkeypatch):
    """Measured, in tenths of a millisecond: torch runs plain loops where it has no kernel."""
    times = iter((1e-4 * integers, 1e-4 * floats))
    monkeypatch.setattr(cpu, "_measure", lambda run: next(times))
    monkeypatch.setattr(cpu, "has_wide_vectors", lambda: is_wide)
    cpu.is_fast.cache_clear()
    try:
        large = facts(512, 1024, 4096)
        reason = "" if is_fast else "float is faster on this processor: torch multiplies codes one by one"
        assert cpu.INT_MM.weigh(large).startswith(reason)
        assert bool(cpu.INT_MM.weigh(large)) is not is_fast
        assert cpu.INT_MM.explain(large) == ""  # it computes them all the same, if somebody asks
    finally:
        cpu.is_fast.cache_clear()
