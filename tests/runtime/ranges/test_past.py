"""Ranges of the past, step by step against their formulas."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from range_formulas import BLOCKS, STARTS, follow, make_case, recording
from range_objects import NAN, text_of

from qcompiler.runtime import ops
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.past import Hindsight, History, Running


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("form", "start"), STARTS)
@pytest.mark.parametrize("estimator", [Running(0.75), Hindsight(), Hindsight(0.75, 0.3)], ids=str)
def test_follows_its_formula(
    estimator: Range, form: str, block: str, start: str, check_formula: Callable[..., None]
) -> None:
    check_formula(estimator, form, block, start)


@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize(("form", "start"), STARTS)
@pytest.mark.parametrize("estimator", [History(), History(4, 1, 1.5)], ids=str)
def test_history_follows_its_formula(
    estimator: Range,
    form: str,
    block: str,
    start: str,
    oracle: ModuleType,
    range_oracle: ModuleType,
    tensor: Callable[[np.ndarray], torch.Tensor],
) -> None:
    """The state is exact. The standard deviation of n float32 numbers is off by at most (n + 4)·2⁻²⁴ of the largest:
    n − 1 sums and a quotient make the mean, and a difference, a square, a sum and a root follow."""
    case = make_case(range_oracle, oracle, estimator, form, block)
    arrays = recording(start)
    state = np.full((estimator.width, case.blocks), NAN, np.float32)
    restarts = 0
    for x, (low, high, after) in zip(arrays, follow(estimator, form, block, map_all(tensor, arrays)), strict=True):
        expected = range_oracle.step(case, x, state)
        own = np.nan_to_num(np.where(np.isnan(state), np.abs(expected.high), state), posinf=0).max(0)
        length, deviations, headroom = case.numbers
        bound = headroom * deviations * (length + 4) * 2.0**-24 * own + 4 * 2.0**-24 * np.abs(expected.high)
        finite = np.isfinite(expected.high)
        assert (np.abs(high.numpy().ravel() - expected.high) <= bound)[finite].all()
        np.testing.assert_array_equal(np.isfinite(high.numpy().ravel()), finite)
        np.testing.assert_array_equal(low.numpy(), -high.numpy())
        np.testing.assert_array_equal(after.numpy().reshape(expected.state.shape), expected.state)
        level = (expected.state == expected.state[:1]).all(0)
        restarts += int((level & (expected.state != state).all(0)).any())
        state = expected.state
    assert restarts >= 2  # the first tensor, and the spike


def map_all(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    return [function(value) for value in values]


def test_the_guard_fires_and_is_counted() -> None:
    """Of 100 elements the guard of 0.02 lets two lie outside, and fires at three."""
    estimator = Hindsight(0.75, 0.02)
    text = text_of(estimator, "int8", "b*s*g*")
    state = torch.tensor([[-1.0, -8.0], [1.0, 8.0], [0.0, 5.0]]).unsqueeze(1)
    for outside, fired in ((2, False), (3, True)):
        x = torch.full((50, 2), 0.5)
        x[:outside, 0] = 4.0
        after = ops.UPDATE(x, state, text, "bc")
        # a range of its own for each channel, one guard for the tensor
        ends = [4.0, 8.0] if fired else [0.75 * 1 + 0.25 * 4, 0.75 * 8 + 0.25 * 0.5]
        assert after.squeeze(1).tolist() == [[-end for end in ends], ends, [float(fired), 5.0 + fired]]


def test_only_the_block_that_is_not_finite_keeps_its_state() -> None:
    state = torch.tensor([[-2.0, -2.0], [2.0, 2.0]]).unsqueeze(1)
    x = torch.tensor([[1.0, 1.0], [NAN, 1.0]])
    after = ops.UPDATE(x, state, text_of(Running(0.5), "int8", "b*s*g*"), "bc")
    assert after.squeeze(1).tolist() == [[-2.0, -1.5], [2.0, 1.5]]
