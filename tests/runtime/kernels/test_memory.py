"""Axes of a tensor in the order of memory: every element has the place, the block and the index that torch gives it."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.runtime.kernels.memory import Axis, list_axes, order_scales
from qcompiler.runtime.numbers.blocks import parse_block, view_blocks


def walk(axes):
    """Yield (scale, logical index) of every element, in the order of memory."""
    for place in itertools.product(*(range(axis.extent) for axis in axes)):
        scale = sum(i // axis.edge * axis.scale for i, axis in zip(place, axes, strict=True))
        yield scale, sum(i * axis.logical for i, axis in zip(place, axes, strict=True))


def lay_out(shape, order):
    """Return the strides of a dense tensor whose dimensions follow each other in memory as in `order`."""
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= shape[d]
    return strides


@st.composite
def views(draw):
    layout = draw(st.sampled_from(["bcss", "oiss", "bbc", "bccc", "bc", "gbc", "c"]))
    shape = tuple(draw(st.integers(1, 6)) for _ in layout)
    edges = "".join(f"{letter}{draw(st.sampled_from(['1', '2', '3', '4', '*']))}" for letter in dict.fromkeys(layout))
    return view_blocks(shape, layout, parse_block(edges)), layout, draw(st.permutations(range(len(shape))))


@given(views(), st.booleans())
def test_every_element_has_its_block_and_its_index(case, whole_blocks):
    view, layout, order = case
    stride = lay_out(view.shape, order)
    scale_stride = order_scales(view, layout, stride)
    axes = list_axes(view, layout, stride, scale_stride, whole_blocks=whole_blocks)
    if axes is None:
        assert layout in ("bbc", "bccc")  # layouts with several dimensions in one axis
        return
    scales = torch.arange(max(1, torch.Size(view.counts).numel())).as_strided(view.counts, scale_stride)
    expected = view.spread(scales).permute(order).reshape(-1)
    index = torch.arange(torch.Size(view.shape).numel()).reshape(view.shape).permute(order).reshape(-1)
    assert [*walk(axes)] == [*zip(expected.tolist(), index.tolist(), strict=True)]


def test_neighbors_with_the_same_blocks_are_one_axis():
    view = view_blocks((4, 16, 5, 5), "bcss", parse_block("b2c8"))
    plain = list_axes(view, "bcss", (400, 25, 5, 1), (50, 25, 5, 1), whole_blocks=True)
    assert plain == (Axis(4, 2, 50, 400), Axis(16, 8, 25, 25), Axis(25, 1, 1, 1))
    stride = (400, 1, 80, 16)
    assert order_scales(view, "bcss", stride) == (50, 1, 10, 2)
    last = list_axes(view, "bcss", stride, (50, 1, 10, 2), whole_blocks=True)
    assert last == (Axis(4, 2, 50, 400), Axis(25, 1, 2, 1), Axis(16, 8, 1, 25))


def test_one_scale_is_one_axis():
    view = view_blocks((4, 3, 5), "bcs", parse_block("tensor"))
    assert list_axes(view, "bcs", (15, 5, 1), (1, 1, 1), whole_blocks=True) == (Axis(60, 60, 1, 1),)
    assert list_axes(view, "bcs", (15, 5, 1), (1, 1, 1), whole_blocks=False) == (Axis(60, 1, 0, 1),)


def test_dimensions_of_one_axis_that_lie_apart_are_refused():
    view = view_blocks((4, 3, 2), "bbc", parse_block("b5"))
    assert list_axes(view, "bbc", (6, 2, 1), (2, 1), whole_blocks=True) is not None
    assert list_axes(view, "bbc", (2, 8, 1), (2, 1), whole_blocks=True) is None


def test_whole_blocks_inside_of_the_last_dimensions_may_lie_apart():
    """Runs of 64 of a sample, in channels-last: each channel has whole runs."""
    view = view_blocks((2, 16, 8, 16), "bccc", parse_block("c64"))
    stride = (2048, 1, 256, 16)
    axes = list_axes(view, "bccc", stride, order_scales(view, "bccc", stride), whole_blocks=True)
    assert axes == (Axis(2, 1, 32, 2048), Axis(128, 64, 1, 1), Axis(16, 1, 2, 128))
    odd = view_blocks((2, 16, 5, 5), "bccc", parse_block("c64"))  # a run goes on in the next channel
    stride = (400, 1, 80, 16)
    assert list_axes(odd, "bccc", stride, order_scales(odd, "bccc", stride), whole_blocks=True) is None


def test_no_elements():
    view = view_blocks((0, 3), "bc", parse_block("b2"))
    assert list_axes(view, "bc", (3, 1), (3, 1), whole_blocks=True) == (Axis(0, 1, 0, 0),)
