"""What every estimator has: a text, limits, frozen ranges, merging, and steps that are not finite."""

import importlib
import re
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
import torch
from range_objects import INF, NAN, text_of

from qcompiler.runtime import ops, ranges
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.estimators import ESTIMATORS, parse_range
from qcompiler.runtime.ranges.past import Hindsight, History, Running
from qcompiler.runtime.ranges.present import Current, Fixed, Percentile
from qcompiler.runtime.ranges.searched import Cosine, LargeGradients
from qcompiler.runtime.spec import QuantSpec, Scale, parse_spec

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


NAMES = ", ".join(kind.name for kind in ESTIMATORS)


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


def test_every_estimator_is_listed() -> None:
    """A class that no list names is an estimator that no recipe can use; two of one name hide each other."""
    modules = [importlib.import_module(f"{ranges.__name__}.{found.name}") for found in iter_modules(ranges.__path__)]
    classes = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    named = {kind for kind in classes if issubclass(kind, Range) and "name" in vars(kind)}
    assert named == {*ESTIMATORS}
    assert len({kind.name for kind in ESTIMATORS}) == len(ESTIMATORS) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"got ''; valid: {NAMES}, with numbers as in hindsight(0.9,0.01)"),
        ("hindsigt", f"got 'hindsigt'; valid: {NAMES}, with numbers"),
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
@pytest.mark.parametrize("name", [kind.name for kind in ESTIMATORS if kind.has_state and not kind.is_learned])
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
