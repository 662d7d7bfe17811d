"""Range estimators: what they observe, and step by step against their formulas."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from range_objects import FORMATS, INF, LAYOUT, NAN, SHAPE, observe, text_of

from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import TENSOR, Block, view_blocks
from qcompiler.runtime.numbers.formats import Kind, parse_format
from qcompiler.runtime.ranges.estimator import Observed, Range
from qcompiler.runtime.ranges.observed import (
    Cosine,
    Current,
    Hindsight,
    History,
    LargeGradients,
    Percentile,
    Running,
)

BLOCKS = ("tensor", "b*s*g*", "b2c4")  # the last does not divide the shape


@pytest.mark.parametrize(
    ("block", "lowest", "highest", "signed", "unsigned"),
    [
        ([1.0, 2.0], 0.0, 2.0, 2.0, 2.0),
        ([-3.0, -2.0], -3.0, 0.0, 3.0, 0.0),
        ([-3.0, 2.0], -3.0, 2.0, 3.0, 2.0),
        ([0.0, -0.0], 0.0, 0.0, 0.0, 0.0),
        ([2.0**-133, 0.0], 0.0, 2.0**-133, 2.0**-133, 2.0**-133),
        ([INF, 1.0], 0.0, INF, INF, INF),
        ([-INF, 1.0], -INF, 1.0, INF, INF),  # an unsigned block shows −inf too
        ([NAN, 1.0], NAN, NAN, NAN, NAN),
        ([NAN, -INF], NAN, NAN, NAN, NAN),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges(
    block: list[float], lowest: float, highest: float, signed: float, unsigned: float, dtype: torch.dtype
) -> None:
    # the block of two stands between others that must not leak into it
    x = torch.tensor([[9.0, -9.0], block, [8.0, -8.0]], dtype=dtype)
    view = view_blocks((3, 2), "bc", Block(channel=2))
    low, high = Observed(x, view, Kind.AFFINE, 8).ends
    results = [low, high, *(Observed(x, view, kind, 7).ends[1] for kind in (Kind.SIGNED, Kind.UNSIGNED))]
    for result, expected in zip(results, (lowest, highest, signed, unsigned), strict=True):
        assert result.dtype == torch.float32
        assert result.shape == (3, 1)
        np.testing.assert_array_equal(result[1].numpy(), [expected])
    assert [float(result[0]) for result in results] == [-9, 9, 9, 9]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_ranges_of_nothing(shape: tuple[int, ...]) -> None:
    view = view_blocks(shape, "bco"[: len(shape)], TENSOR)
    x = torch.empty(shape)
    for result in (end for kind in Kind for end in Observed(x, view, kind, 7).ends):
        assert result.dtype == torch.float32
        assert tuple(result.shape) == view.counts
        assert not result.any()


def test_range_does_not_see_the_filling(tensor: Callable[[np.ndarray], torch.Tensor]) -> None:
    x = tensor(np.full(5, -4, np.float32))
    low, high = Observed(x, view_blocks((5,), "c", Block(channel=3)), Kind.AFFINE, 8).ends
    assert (low.tolist(), high.tolist()) == ([-4, -4], [0, 0])


def recording(start: str = "normal", steps: int = 20, seed: int = 0) -> list[np.ndarray]:
    """20 tensors as training brings them: a drifting scale, a spike, zeros, an infinity, a NaN."""
    draw = np.random.default_rng(seed)
    tensors = [draw.standard_normal(SHAPE).astype(np.float32) * np.float32(1.2**t) for t in range(steps)]
    tensors[5] *= np.float32(30)
    tensors[9][:] = 0
    tensors[12][1, 2, 0] = -INF
    tensors[14][4, 5, 2] = NAN
    tensors[16][:, 1] *= np.float32(1e-3)
    if start == "zeros":
        tensors[0][:] = 0
    elif start == "infinite":
        tensors[0][2, 3, 1] = INF
    elif start == "nan":
        tensors[0][0, 0, 0] = NAN
    return tensors


def make_case(range_oracle: ModuleType, oracle: ModuleType, estimator: Range, form: str, block: str) -> Any:
    """The oracle's view of an estimator in front of tensors of SHAPE."""
    edges = oracle.read_spec(f"{form}:real:{block}:nearest:pass").edges
    number, counts = oracle.block_numbers(SHAPE, LAYOUT, edges)
    numbers = tuple(float(text) for text in str(estimator).partition("(")[2].rstrip(")").split(",") if text)
    parsed = parse_format(form)
    return range_oracle.Case(estimator.name, numbers, str(parsed.kind), parsed.bits, number, math.prod(counts))


def follow(estimator: Range, form: str, block: str, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """(low, high, state after) of each tensor, through the operator `update`, as the graph runs it."""
    counts = observe(tensors[0], form, block).view.counts
    state = torch.full(estimator.state_shape(counts), NAN)
    result = []
    for x in tensors:
        seen = observe(x, form, block)
        held = estimator.by_axis(state, counts)
        used = torch.where(torch.isnan(held), estimator.first(seen), held)
        low, high = estimator.ends(seen, used)
        first = bool(torch.isnan(state).any())
        after = ops.UPDATE(x, state, text_of(estimator, form, block), LAYOUT, first)
        assert after.dtype == torch.float32
        assert after.shape == state.shape
        result.append((low, high, after))
        state = after
    return result


STARTS = [("int4", "normal"), ("int4", "zeros"), ("int4", "infinite"), ("uint4", "nan"), ("affine8", "infinite")]


EXACT = [Running(0.75), Hindsight(), Hindsight(0.75, 0.3), LargeGradients(0.5), LargeGradients(0.5, 0.01, 0.9)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("form", "start"), STARTS)
@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_follows_its_formula(
    estimator: Range,
    form: str,
    block: str,
    start: str,
    oracle: ModuleType,
    range_oracle: ModuleType,
    tensor: Callable[[np.ndarray], torch.Tensor],
) -> None:
    case = make_case(range_oracle, oracle, estimator, form, block)
    arrays = recording(start)
    got = follow(estimator, form, block, [tensor(x) for x in arrays])
    state = np.full((estimator.width, case.blocks if estimator.by_block else 1), NAN, np.float32)
    for t, (x, (low, high, after)) in enumerate(zip(arrays, got, strict=True)):
        expected = range_oracle.step(case, x, state)
        for mine, other in ((low, expected.low), (high, expected.high)):
            np.testing.assert_array_equal(mine.numpy().ravel(), other, err_msg=f"range of step {t}")
        flat = after.numpy().reshape(expected.state.shape)
        np.testing.assert_array_equal(flat, expected.state, err_msg=f"state after step {t}")
        state = expected.state
    assert np.isfinite(state).all()


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


@pytest.mark.parametrize("form", ["int4", "uint4", "affine8", "int8"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_cosine_finds_the_best_clip(
    form: str, steps: int, oracle: ModuleType, range_oracle: ModuleType, tensor: Callable[[np.ndarray], torch.Tensor]
) -> None:
    """A cosine is three float32 sums of n products, each off by at most n·2⁻²⁴: the choice is the best but for that."""
    estimator = Cosine(100, steps)
    case = make_case(range_oracle, oracle, estimator, form, "tensor")
    slack = 3 * math.prod(SHAPE) * 2.0**-24
    inner = 0
    for x in recording():
        x = x**3  # heavy tails, which are worth clipping
        if not np.isfinite(x).all():
            continue
        state = estimator.first(observe(tensor(x), form, "tensor"))
        assert state.shape == (2, 1)
        clip, deviation = state.flatten().tolist()
        options = dict(range_oracle.cosines(case, x))
        assert clip in options
        assert options[np.float32(clip)] >= max(options.values()) - slack
        assert abs(deviation - (1 - options[np.float32(clip)])) <= slack
        inner += clip < np.abs(x).max()
        low, high = estimator.ends(observe(tensor(x), form, "b2c4"), state)
        assert high.shape == (3, 2, 3)
        assert (high == clip).all()
        assert torch.equal(low, -high)
        assert torch.equal(estimator.update(observe(tensor(x), form, "tensor"), state), state) or not x.any()
    assert inner >= (4 if steps == 20 and form in ("int4", "uint4") else 0)


def test_cosine_takes_the_largest_of_equal_clips() -> None:
    # one magnitude: every clip points in the direction of x; half a clip gives the same bits but for the exponent
    x = torch.tensor([4.0, -4.0, 4.0])
    assert Cosine(100, 2).first(observe(x, "int4", "tensor", "c")).flatten().tolist() == [4, 0]


def test_cosine_seeks_again_after_zeros() -> None:
    text = text_of(Cosine(), "int4", "tensor")
    empty, found = torch.full((2, 1), NAN), torch.tensor([[3.0], [0.25]])
    zeros = ops.UPDATE(torch.zeros(4), empty, text, "c", True)
    assert zeros.isnan().all()
    assert ops.SCALE(torch.zeros(4), text, "c", zeros, True) == 2.0**-126
    # and a search of a later step keeps what was found before
    assert torch.equal(ops.UPDATE(torch.zeros(4), found, text, "c", True), found)
    assert torch.equal(ops.UPDATE(torch.tensor([NAN, 1.0]), found, text, "c", True), found)
