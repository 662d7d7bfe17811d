"""The places of maxima are saved as bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.save_pool_windows import SavePoolWindows
from qcompiler.passes.ir.meta import get_value
from qcompiler.runtime import ops


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_golden_pool_windows(in_front_of, settle_halves, text, golden):
    halves = in_front_of(SavePoolWindows, "identity", nn.MaxPool2d(2, padding=1), leaf(1, 2, 4, 6))
    before = text(halves)
    assert settle_halves(halves, SavePoolWindows()) == 1
    golden(before=before, after=text(halves))


@pytest.mark.parametrize(
    "model",
    [nn.MaxPool2d(2, dilation=2), nn.MaxPool2d((3, 86)), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2)],
    ids=["dilation", "258 places", "mean", "adaptive"],
)
def test_does_not_fire(model, in_front_of, settle_halves, text):
    halves = in_front_of(SavePoolWindows, "identity", model, leaf(1, 2, 6, 90))
    before = text(halves)
    assert settle_halves(halves, SavePoolWindows()) == 0
    assert text(halves) == before


def test_does_not_fire_without_backward(in_front_of):
    halves = in_front_of(SavePoolWindows, "identity", nn.MaxPool2d(2), leaf(1, 2, 4, 4))
    assert SavePoolWindows()(Halves.of_forward(halves.forward, 1)) == 0


@pytest.mark.parametrize("model", [nn.MaxPool2d((2, 128)), nn.MaxPool2d(2, 1), nn.MaxPool2d(3, (2, 1), (1, 0))])
def test_a_byte_a_maximum_is_saved(model, in_front_of, settle_halves):
    x = leaf(1, 2, 6, 129)
    halves = in_front_of(SavePoolWindows, "identity", model, x)
    assert settle_halves(halves, SavePoolWindows()) == 1
    (saved,) = [node for node in halves.saved if node.target is ops.POOL_OFFSETS]
    assert get_value(saved).dtype is torch.uint8
    assert get_value(saved).shape == model(x).shape
    assert not any(get_value(node).dtype is torch.int64 for node in halves.saved)


def draw_windows(data):
    """Return size, kernel, stride and padding of one dimension: half of the kernel at most is padding."""
    kernel = data.draw(st.integers(1, 4))
    padding = data.draw(st.integers(0, kernel // 2))
    return data.draw(st.integers(max(1, kernel - 2 * padding), 9)), kernel, data.draw(st.integers(1, 4)), padding


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 2), st.booleans(), st.data())
def test_offsets_give_the_indices_back(batch, ceil_mode, data):
    plane, kernel, stride, padding = zip(draw_windows(data), draw_windows(data), strict=True)
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf])
    flat = data.draw(st.lists(values, min_size=plane[0] * plane[1], max_size=plane[0] * plane[1]))
    x = torch.tensor(flat).reshape(1, 1, *plane).expand(batch, 2, *plane)
    _, indices = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    windows = ([*plane], [*kernel], [*stride], [*padding])
    offsets = ops.POOL_OFFSETS(indices, *windows)
    assert offsets.dtype is torch.uint8
    assert torch.equal(ops.POOL_INDICES(offsets, *windows), indices)
    assert (offsets < kernel[0] * kernel[1]).all()


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), (1, 2), (1, 0), ceil_mode=True), nn.MaxPool2d(3, 1)],
)
def test_no_bit_changes(pool, changes_no_bit):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 2, 2))

    assert changes_no_bit(build, "tensor-int8", [leaf(2, 2, 9, 9)], SavePoolWindows) == 1


@pytest.mark.parametrize(("pool", "shape"), [(nn.MaxPool2d(2), (2, 5, 6)), (nn.MaxPool1d(2), (2, 3, 7))])
def test_other_ranks_give_the_same_bits(pool, shape, changes_no_bit):
    assert changes_no_bit(lambda: nn.Sequential(pool), "identity", [leaf(*shape)], SavePoolWindows) == 1


def test_indices_that_the_user_takes_too_give_the_same_bits(changes_no_bit, function):
    def forward(_, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2) * 2 + x

    assert changes_no_bit(lambda: function(forward), "identity", [leaf(2, 3, 6, 6)], SavePoolWindows) >= 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_special_inputs_give_the_same_bits(bad, changes_no_bit):
    x = torch.randn(2, 2, 6, 6)
    x[0, 0, 2:4, 2:4] = bad  # a whole window
    x[1, 1, 0, 0] = bad
    assert changes_no_bit(lambda: nn.MaxPool2d(2), "identity", [x.requires_grad_()], SavePoolWindows) == 1
    assert changes_no_bit(lambda: nn.MaxPool2d(2), "identity", [leaf(0, 2, 6, 6)], SavePoolWindows) == 1
