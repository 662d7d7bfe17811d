"""A layer with ranges of the past, and the comparison of an estimator with its formula."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from past_ranges import SPEC, recipe
from range_formulas import follow, make_case, recording
from range_objects import NAN
from torch import nn

from qcompiler.runtime.ranges.estimator import Range


@pytest.fixture
def linear(eager):
    """linear(spec) → a compiled linear layer without bias; its sites are input, weight and grad."""
    return lambda spec=SPEC: eager(nn.Linear(4, 3, bias=False), recipe(spec))


@pytest.fixture
def check_formula(
    oracle: ModuleType, range_oracle: ModuleType, tensor: Callable[[np.ndarray], torch.Tensor]
) -> Callable[[Range, str, str, str], None]:
    """Asserts that 20 steps of an estimator agree with its formula bit for bit: both ends, and the state after."""

    def check(estimator: Range, form: str, block: str, start: str) -> None:
        case = make_case(range_oracle, oracle, estimator, form, block)
        arrays = recording(start)
        state = np.full((estimator.width, case.blocks if estimator.by_block else 1), NAN, np.float32)
        got = follow(estimator, form, block, [tensor(x) for x in arrays])
        for t, (x, (low, high, after)) in enumerate(zip(arrays, got, strict=True)):
            expected = range_oracle.step(case, x, state)
            for mine, other in ((low, expected.low), (high, expected.high)):
                np.testing.assert_array_equal(mine.numpy().ravel(), other, err_msg=f"range of step {t}")
            flat = after.numpy().reshape(expected.state.shape)
            np.testing.assert_array_equal(flat, expected.state, err_msg=f"state after step {t}")
            state = expected.state
        assert np.isfinite(state).all()

    return check
