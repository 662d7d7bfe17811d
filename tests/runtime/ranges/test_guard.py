"""The guard of `hindsight`: which elements count as clipped, and that a range which still fits is left alone."""

import numpy as np
import pytest
import torch

from qcompiler.runtime import ops

NAN = float("nan")


def spec(form: str, guard: float = 0.01, scale: str = "real") -> str:
    return f"{form}:{scale}:tensor:nearest:pass:hindsight(0.9,{guard:g})"


def fires(form: str, low: float, high: float, values: list[float], guard: float = 0.01) -> bool:
    """True where the guard fires when a tensor of these values meets the range."""
    state = torch.tensor([[low], [high], [0.0]])
    after = ops.UPDATE(torch.tensor(values), state, spec(form, guard), "c")
    return after[2].item() == 1


@pytest.mark.parametrize(("form", "low", "levels"), [("int8", -8.0, 254), ("uint8", 0.0, 255), ("affine8", 0.0, 255)])
@pytest.mark.parametrize(("steps", "fired"), [(-1, False), (0, False), (0.49, False), (0.51, True), (1, True)])
def test_only_what_rounds_beyond_the_last_code_counts(
    form: str, low: float, levels: int, steps: float, fired: bool
) -> None:
    step = (8.0 - low) / levels
    assert fires(form, low, 8.0, [8.0 + steps * step, 1.0]) is fired
    if form == "int8":
        assert fires(form, low, 8.0, [-8.0 - steps * step, 1.0]) is fired
    if form == "affine8":
        assert fires(form, -8.0, 0.0, [-8.0 - steps * step, -1.0]) is fired


@pytest.mark.parametrize(("value", "fired"), [(254.6, False), (255.4, False), (255.6, True)])
def test_the_zero_point_moves_the_grid(value: float, fired: bool) -> None:
    """Steps of 1 from −0.4 to 254.6: zero has code 0, so code 255 is 255 and serves up to 255.5."""
    assert fires("affine8", -0.4, 254.6, [value, 1.0]) is fired
    # the other way: 0.4 below the range, though beyond half a step of code 0
    assert not fires("affine8", -0.4, 254.6, [-0.8, 1.0])
    assert fires("affine8", -0.4, 254.6, [-1.0, 1.0])


@pytest.mark.parametrize("low", [(0 - 0.2860) / 0.3530, -0.1307 / 0.3081, -1.0, -2.1179])
@pytest.mark.parametrize("form", ["affine8", "affine4", "int8"])
def test_a_constant_end_that_many_elements_share_never_fires(form: str, low: float) -> None:
    """Images have a background: half of all pixels are the minimum, and the average of equal numbers drifts."""
    x = torch.tensor([low] * 50 + [0.0] * 50)
    state = torch.full((3, 1), NAN)
    lows = set()
    for step in range(50):
        state = ops.UPDATE(x, state, spec(form), "c", step == 0)
        lows.add(state[0].item())
    assert state[2].item() == 0
    assert max(abs(found - low) for found in lows) <= 4 * 2.0**-23 * abs(low)


def test_the_average_of_equal_numbers_does_drift() -> None:
    """What the test above relies on: the minimum of normalized Fashion-MNIST is not its own average."""
    low = np.float32((0 - 0.2860) / 0.3530)
    assert np.float32(0.9) * low + np.float32(1 - 0.9) * low > low


def test_negative_elements_of_unsigned_formats_do_not_count() -> None:
    """They become 0 in any range, so a new one would not help."""
    assert not fires("uint8", 0.0, 8.0, [-5.0, -5.0, 1.0])
    assert fires("uint8", 0.0, 8.0, [-5.0, -5.0, 9.0])


@pytest.mark.parametrize("form", ["int8", "uint8", "affine8", "e4m3", "e6m1b0"])
def test_a_range_of_zeros_fires_at_once(form: str) -> None:
    assert fires(form, 0.0, 0.0, [0.0, 1e-10])
    assert not fires(form, 0.0, 0.0, [0.0, 0.0])


@pytest.mark.parametrize("form", ["affine8", "int8"])
def test_the_largest_ranges_do_not_overflow(form: str) -> None:
    top = torch.finfo(torch.float32).max
    assert not fires(form, -top, top, [top, -top])
    assert fires(form, -top / 2, top / 2, [top, 1.0])


def test_the_fraction_must_exceed_the_guard() -> None:
    assert not fires("int8", -1.0, 1.0, [2.0] * 2 + [0.5] * 98, guard=0.02)
    assert fires("int8", -1.0, 1.0, [2.0] * 3 + [0.5] * 97, guard=0.02)


@pytest.mark.parametrize("form", ["affine8", "int8", "uint8"])
def test_a_tensor_that_changes_its_sign_every_step_is_not_clipped_to_zero(form: str) -> None:
    """The loss of a critic, once with each sign: a range that only followed would clip all of it, in every step."""
    sign, state, lost = 1.0, torch.full((3, 1), NAN), []
    for step in range(20):
        x = sign * torch.linspace(0.1, 1.0, 64)
        if form == "uint8":
            x = x.abs()
        scale = ops.SCALE(x, spec(form), "c", state, step == 0)
        point = ops.ZERO_POINT(x, scale, spec(form), "c", state, step == 0) if form == "affine8" else None
        codes = ops.QUANTIZE(x, scale, point, None, spec(form), "c", "site")
        back = ops.DEQUANTIZE(codes, scale, point, spec(form), "c", torch.float32)
        lost.append(((back - x).square().sum() / x.square().sum()).item())
        state = ops.UPDATE(x, state, spec(form), "c", step == 0)
        sign = -sign
    assert lost[0] < 1e-4
    # of [−a, 1] and [−1, a] the shorter side has shrunk by one average at most: a ≥ 0.9, at most 0.1 off of the largest
    assert max(lost[2:]) < 0.01
