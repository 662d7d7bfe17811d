"""Integer biases: what a layer adds is a whole number of its unit, the one nearest to the float bias."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops
from qcompiler.runtime.numbers.biases import integer_bias

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
NUMBERS = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
SCALES = st.floats(2.0**-13, 0.5, width=32)


def nearest(whole: Fraction, unit: Fraction) -> Fraction:
    """The multiple of `unit` nearest to `whole`, exactly."""
    return round(whole / unit) * unit


@given(st.lists(NUMBERS, min_size=1, max_size=4), SCALES, SCALES)
@PROPERTY
def test_a_bias_is_the_nearest_whole_number_of_its_unit(numbers: list[float], x_scale: float, scale: float) -> None:
    bias = torch.tensor(numbers)
    found = integer_bias(bias, torch.tensor([[x_scale]]), torch.tensor(scale))
    unit = Fraction(torch.tensor(x_scale).item()) * Fraction(torch.tensor(scale).item())
    for one, number in zip(found.tolist(), bias.tolist(), strict=True):
        # float64 keeps the product of two float32 whole; then count · unit is rounded, and the result to float32
        assert one == pytest.approx(float(nearest(Fraction(number), unit)), rel=2.0**-23, abs=1e-30) or (
            abs(abs(Fraction(number) / unit) % 1 - Fraction(1, 2)) < Fraction(1, 10**9)  # the middle of two
        )


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, SCALES, SCALES), min_size=1, max_size=4), SCALES)
@PROPERTY
def test_with_a_batch_norm_the_bias_of_both_together_is_whole(rows: list[tuple[float, ...]], x_scale: float) -> None:
    bias, gamma, beta, mean, var, scale = (torch.tensor(column) for column in zip(*rows, strict=True))
    eps = 2.0**-10
    found = integer_bias(bias, torch.tensor(x_scale), scale, gamma, beta, mean, var, eps)
    for c, after in enumerate(found.tolist()):
        gain = gamma[c].item() / math.sqrt(var[c].item() + eps)
        unit = torch.tensor(x_scale).item() * scale[c].item() * abs(gain)
        if unit == 0:
            assert after == beta[c].item()
            continue
        count = (bias[c].item() * gain + after - mean[c].item() * gain) / unit
        # the result is float32, off by 2^-24 of its size, which is up to 4 and half a unit
        assert abs(count - round(count)) <= 2.0**-24 * (abs(after) + 4) / unit + 1e-6
        assert abs(after - beta[c].item()) <= unit / 2 + 2.0**-23 * (abs(after) + 4)


@pytest.mark.parametrize(
    ("bias", "scale", "expected"),
    [
        (0.375, 0.0, 0.375),  # no unit
        (0.375, math.nan, 0.375),
        (0.375, math.inf, 0.375),
        (3.0, 1e-10, 3.0),  # 3·10^10 units, above 32 bits
        (math.inf, 0.5, math.inf),
        (0.0, 0.5, 0.0),
        (-0.7, 0.5, -0.5),
        (0.75, 0.5, 1.0),  # the even one of two: 1.5 → 2
        (0.25, 0.5, 0.0),
    ],
)
def test_edges(bias: float, scale: float, expected: float) -> None:
    assert integer_bias(torch.tensor([bias]), torch.ones(1, 1), torch.tensor([scale])).tolist() == [expected]
    assert integer_bias(torch.tensor([math.nan]), torch.ones(()), torch.tensor([scale])).isnan().all()


def test_parts_that_are_absent_are_zero_and_one() -> None:
    mean, var, scale = torch.randn(3), torch.rand(3), torch.tensor([[0.1], [0.2], [0.3]])
    given = (torch.tensor(0.01), scale)
    none = integer_bias(None, *given, None, None, mean, var, 0.1)
    explicit = integer_bias(torch.zeros(3), *given, torch.ones(3), torch.zeros(3), mean, var, 0.1)
    assert torch.equal(none, explicit)
    assert none.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_has_the_shape_and_type_of_its_bias(dtype: torch.dtype) -> None:
    parts = (torch.randn(3, dtype=dtype), torch.ones(1), torch.rand(3, 1), torch.rand(3), torch.rand(3))
    call = (*parts, torch.randn(3), torch.rand(3), 0.1)
    found = ops.INTEGER_BIAS(*call)
    fake = torch.empty(3, dtype=dtype, device="meta")
    made = torch.ops.qcompiler.integer_bias(*(p.to("meta") if isinstance(p, torch.Tensor) else p for p in call))
    assert (found.shape, found.dtype) == (fake.shape, fake.dtype) == (made.shape, made.dtype)
