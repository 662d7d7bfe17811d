"""Ranges that clip on purpose: the search of `cosine`, and the count that moves `large`."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from range_formulas import BLOCKS, STARTS, make_case, recording
from range_objects import NAN, SHAPE, observe, text_of

from qcompiler.runtime import ops
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.searched import Cosine, LargeGradients


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


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("form", "start"), STARTS)
@pytest.mark.parametrize("estimator", [LargeGradients(0.5), LargeGradients(0.5, 0.01, 0.9)], ids=str)
def test_large_follows_its_formula(
    estimator: Range, form: str, block: str, start: str, check_formula: Callable[..., None]
) -> None:
    check_formula(estimator, form, block, start)


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
