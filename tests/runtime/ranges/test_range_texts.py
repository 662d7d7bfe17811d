"""Ranges as texts, the guard, frozen ranges, and steps that are not finite."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from range_objects import FORMATS, INF, NAN, SHAPE, observe, text_of

from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.observed import (
    ESTIMATORS,
    Cosine,
    Current,
    Fixed,
    Hindsight,
    History,
    LargeGradients,
    Percentile,
    Running,
    parse_range,
)
from qcompiler.runtime.spec import QuantSpec, Scale, parse_spec


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


ALL = [
    Current(),
    Running(0.99),
    Hindsight(0.5, 0.25),
    Fixed(-6, 0),
    Percentile(99.99),
    History(8, 2, 1.5),
    Cosine(10, 50),
    LargeGradients(1e-4, 2e-5, 0.9),
    Running(0.9999999),
    Hindsight(0.123456789, 1e-12),
    LargeGradients(1 / 3),
]


@pytest.mark.parametrize("estimator", [*ALL, *(kind() for kind in ESTIMATORS)], ids=str)
def test_text_and_value_are_one(estimator: Range) -> None:
    assert parse_range(str(estimator)) == estimator
    spec = QuantSpec(format=IntFormat(4), scale=Scale.REAL, block=TENSOR, range=estimator)
    assert parse_spec(str(spec)) == spec
    assert (str(spec).count(":") == 4) is (estimator == Current())


def test_numbers_that_are_left_out_have_their_defaults() -> None:
    assert parse_range("hindsight") == parse_range("hindsight()") == Hindsight(0.9, 0.01)
    assert parse_range("hindsight(0.5)") == Hindsight(0.5, 0.01)
    assert parse_range("large(0.001,0.002)") == LargeGradients(0.001, 0.002, 0.0)
    assert {kind.name for kind in ESTIMATORS} == {
        *("current", "running", "hindsight", "fixed", "percentile", "history", "cosine", "large"),
        *("sawb", "adaptive", "learned", "lsq", "pact"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "valid: current, running, hindsight"),
        ("hindsigt", "valid: current, running, hindsight"),
        ("Current", "got 'Current'"),
        ("hindsight(0.9", "got 'hindsight"),
        ("hindsight 0.9", "got 'hindsight"),
        ("hindsight(x)", "got 'hindsight"),
        ("hindsight(0.9,)", "could not convert"),
        ("hindsight(0.9,0.1,0.2)", "takes 2 numbers"),
        ("current(1)", "takes 0 numbers"),
        ("running(nan)", "got 'running"),
        ("fixed(1,2)", "must have zero between them"),
        ("fixed(0,0)", "must have zero between them"),
        ("fixed(-1,-0.5)", "must have zero between them"),
        ("percentile(0)", "above 0, at most 100"),
        ("percentile(100.1)", "above 0, at most 100"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_range(text)


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


def test_frozen_ranges_are_those_of_the_state_alone() -> None:
    """What the present tensor holds does not matter, but for `large`, whose range is γ times its own."""
    states = {
        "running": [[-2.0], [2.0]],
        "hindsight": [[-2.0], [2.0], [0.0]],
        "history": [[1.0]] * 16,
        "cosine": [[2.0], [0.5]],
    }
    for name, numbers in states.items():
        text = f"int8:real:tensor:nearest:pass:{name}"
        scales = [ops.SCALE(k * torch.ones(4), text, "c", torch.tensor(numbers), False, True) for k in (1.0, 50.0)]
        assert torch.equal(*scales), name
        assert scales[0].item() == np.float32(2) / np.float32(127), name
    moving = [ops.SCALE(k * torch.ones(4), "int8:real:tensor:nearest:pass:running", "c",
                        torch.tensor(states["running"]), False, False) for k in (1.0, 50.0)]  # fmt: skip
    assert not torch.equal(*moving)


@pytest.mark.parametrize(
    ("estimator", "one", "other", "merged"),
    [
        (Running(), [[-1.0], [2.0]], [[-3.0], [1.0]], [[-3.0], [2.0]]),
        (Hindsight(), [[-1.0], [2.0], [7.0]], [[-3.0], [1.0], [4.0]], [[-3.0], [2.0], [7.0]]),
        (History(2), [[1.0], [5.0]], [[4.0], [2.0]], [[4.0], [5.0]]),
        (Cosine(), [[1.0], [0.5]], [[2.0], [0.25]], [[2.0], [0.5]]),
        (LargeGradients(momentum=0.9), [[0.5], [3.0]], [[0.7], [1.0]], [[0.7], [3.0]]),
    ],
    ids=str,
)
def test_merging_takes_the_wider(estimator: Range, one: Any, other: Any, merged: Any) -> None:
    a, b = torch.tensor(one), torch.tensor(other)
    assert torch.equal(estimator.merge(a, b), torch.tensor(merged))
    assert torch.equal(estimator.merge(b, a), torch.tensor(merged))
    assert torch.equal(estimator.merge(a, a), a)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["running", "hindsight", "history", "cosine", "large"])
def test_a_step_that_is_not_finite_leaves_the_state(name: str, momentum: float, bad: float, first: bool) -> None:
    estimator = LargeGradients(momentum=momentum) if name == "large" else parse_range(name)
    text = text_of(estimator, "int4", "tensor")
    good = torch.tensor([1.0, -2.0, 0.5])
    empty = torch.full((estimator.width, 1), NAN)
    state = ops.UPDATE(good, empty, text, "c", True)
    assert torch.isfinite(state).all()
    x = torch.tensor([1.0, bad, 3.0])
    assert torch.equal(ops.UPDATE(x, state, text, "c", first), state)
    assert ops.UPDATE(x, empty, text, "c", True).isnan().all()


def test_only_the_block_that_is_not_finite_keeps_its_state() -> None:
    state = torch.tensor([[-2.0, -2.0], [2.0, 2.0]]).unsqueeze(1)
    x = torch.tensor([[1.0, 1.0], [NAN, 1.0]])
    after = ops.UPDATE(x, state, text_of(Running(0.5), "int8", "b*s*g*"), "bc")
    assert after.squeeze(1).tolist() == [[-2.0, -1.5], [2.0, 1.5]]


@pytest.mark.parametrize("form", ["int8:fit", "int8:real", "affine8:real"])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_checked_scales_show_what_a_static_range_hides(form: str, bad: float) -> None:
    """The codes come from the range of the past; the block with the bad number dequantizes to NaN, its neighbor not."""
    text = f"{form}:b*s*g*:nearest:pass:hindsight(0.9,0.01)"
    state = torch.tensor([[-4.0, -4.0], [4.0, 4.0], [0.0, 0.0]]).unsqueeze(1)
    x = torch.tensor([[1.0, 2.0], [bad, -3.0]])
    scale = ops.SCALE(x, text, "bc", state, False)
    point = ops.ZERO_POINT(x, scale, text, "bc", state, False) if form.startswith("affine") else None
    assert torch.isfinite(scale.float()).all()
    codes = ops.QUANTIZE(x, scale, point, None, text, "bc", "x")
    check = ops.CHECKED(scale, x, text, "bc")
    assert check.dtype == scale.dtype
    values = ops.DEQUANTIZE(codes, check, point, text, "bc", torch.float32)
    assert values[:, 0].isnan().all()
    step = 8 / 255 if form.startswith("affine") else 4 / 127 if form.endswith("real") else 2.0**-4
    assert (values[:, 1] - x[:, 1]).abs().max() <= step / 2 * (1 + 2.0**-20)
    assert torch.equal(ops.CHECKED(scale, torch.ones(2, 2), text, "bc"), scale)


def test_large_settles_where_its_share_is_clipped() -> None:
    """γ goes down after a step that clips less than the target and up after one that clips more, by `rate`; so over T
    steps the counts of both differ by |γ_T − γ_0| / rate, and the target is a quantile q of what was clipped, with
    |q − ½| ≤ |γ_T − γ_0| / (2·rate·T). A mean is at most √((1−q)/q) standard deviations away from the quantile q."""
    estimator = LargeGradients(ratio=0.5, rate=0.001)
    target = 0.5 / (2**4 - 1)
    draw = torch.Generator().manual_seed(0)
    state = torch.ones(1, 1)
    gammas, shares = [], []
    for _ in range(3000):
        seen = observe(torch.randn(1999, generator=draw), "int4", "tensor", "c")
        shares.append(seen.outside(estimator.ends(seen, state)).item())
        state = estimator.update(seen, state)
        gammas.append(state.item())
    settled = np.array(shares[1000:])
    assert not np.isclose(settled, target, rtol=0, atol=1e-6).any()  # 1999/30 is no integer
    above = (settled > target).mean()
    assert abs(above - 0.5) <= abs(gammas[-1] - gammas[999]) / (2 * 0.001 * 2000) + 1e-3
    spread = settled.std()
    assert abs(settled.mean() - target) <= spread * math.sqrt((0.5 + abs(above - 0.5)) / (0.5 - abs(above - 0.5)))
    assert spread < target / 2
    assert settled[:100].mean() == pytest.approx(settled[-100:].mean(), abs=4 * spread / math.sqrt(50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("running(1.5)", r"running: momentum: got 1.5; valid: a number from 0 to 1$"),
        ("hindsight(0.9,-1)", r"hindsight: guard: got -1; valid: a number from 0 to 1$"),
        ("history(0)", r"history: length: got 0; valid: a whole number from 1 to 10000$"),
        ("history(1.5)", r"history: length: got 1.5; valid: a whole number from 1 to 10000$"),
        ("cosine(0.5)", r"cosine: every: got 0.5; valid: a whole number from 1 to 1e\+09$"),
        ("cosine(5,0)", r"cosine: steps: got 0; valid: a whole number from 1 to 10000$"),
        ("large(-1)", r"large: ratio: got -1; valid: a number from 0 to 1$"),
        ("adaptive(2)", r"adaptive: rate: got 2; valid: a number from 0 to 1$"),
        ("learned(0)", r"learned: deviations: got 0; valid: a number from 0.01 to 1000$"),
        ("pact(0)", r"pact: start: got 0; valid: a number from 1e-06 to 1e\+06$"),
    ],
)
def test_numbers_out_of_their_limits(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_range(text)
