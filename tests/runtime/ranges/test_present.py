"""Ranges without a state, against their formulas and by hand."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from range_formulas import BLOCKS, make_case, recording
from range_objects import FORMATS, SHAPE, observe

from qcompiler.runtime import ops
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.present import Current, Fixed, Percentile


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "estimator", [Current(), Percentile(), Percentile(90.0), Percentile(50.0), Percentile(100.0)], ids=str
)
def test_dynamic_ranges_without_a_state(
    estimator: Range,
    form: str,
    block: str,
    oracle: ModuleType,
    range_oracle: ModuleType,
    tensor: Callable[[np.ndarray], torch.Tensor],
) -> None:
    case = make_case(range_oracle, oracle, estimator, form, block)
    for x in recording():
        low, high = estimator.ends(observe(tensor(x), form, block), torch.empty(0))
        expected = getattr(range_oracle, estimator.name)(case, x)
        np.testing.assert_array_equal(low.numpy().ravel(), expected[0])
        np.testing.assert_array_equal(high.numpy().ravel(), expected[1])


@pytest.mark.parametrize(("percent", "count", "outside"), [(90, 10, 1), (99.9, 1000, 1), (99, 99, 0), (50, 7, 3)])
def test_a_percentile_leaves_its_share_outside(percent: float, count: int, outside: int) -> None:
    # ⌊10·(1 − 90/100)⌋ is 1, though 1 − 90/100 falls short of 0.1 in binary
    x = torch.randperm(count).float() + 1
    seen = observe(x, "int8", "tensor", "c")
    low, high = Percentile(percent).ends(seen, x)
    assert (high.item(), low.item()) == (count - outside, outside - count)
    assert seen.outside((low, high)).item() == pytest.approx(outside / count, rel=2.0**-23)


@pytest.mark.parametrize("form", FORMATS)
def test_fixed_is_what_it_says(form: str) -> None:
    low, high = Fixed(-0.5, 2.0).ends(observe(torch.randn(SHAPE), form, "b2c4"), torch.empty(0))
    assert (low == -0.5).all()
    assert (high == 2).all()
    assert low.shape == high.shape == (3, 2, 3)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_fixed_range_quantizes_on_its_own_grid(low: float) -> None:
    # 0 … 2 and −1 … 2 in 15 steps; −1 is 5 of them below zero
    text = f"affine4:real:tensor:nearest:pass:fixed({low:g},2)"
    x = torch.tensor([-5.0, 0.0, 1.0, 5.0])
    scale = ops.SCALE(x, text, "c")
    point = ops.ZERO_POINT(x, scale, text, "c")
    step = torch.tensor(2.0) / 15 - torch.tensor(low) / 15
    assert scale == step
    assert point.item() == (5 if low else 0)
    codes = ops.QUANTIZE(x, scale, point, None, text, "c", "x")
    assert codes.tolist() == [0, point.item(), point.item() + round(1 / step.item()), 15]
