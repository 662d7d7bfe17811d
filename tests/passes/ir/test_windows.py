"""Which indices a convolution and its gradients read, by enumeration."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph

from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.windows import Geometry, read_geometry

PROPERTY = settings(derandomize=True, deadline=None, max_examples=500)


def triples_of_forward(geometry):
    """(input, output, tap) of one dimension, border left out."""
    w = geometry.forward
    for o, i in itertools.product(range(w.count[0]), range(w.taps[0])):
        y = w.start[0] + w.step[0] * o + w.dilation[0] * i
        if 0 <= y < geometry.space[0]:
            yield y, o, i


def triples_of_backward(geometry):
    """The same triples, read off the windows of the input gradient: position t holds inputs stride·t + r − padding."""
    w, stride = geometry.backward, geometry.stride[0]
    for t, u, r in itertools.product(range(w.count[0]), range(w.taps[0]), range(stride)):
        o = w.start[0] + w.step[0] * t + w.dilation[0] * u
        y = stride * (geometry.first[0] + t) + r - geometry.padding[0]
        i = r + stride * (w.taps[0] - 1 - u)
        if 0 <= o < geometry.result[0] and 0 <= y < geometry.space[0] and i < geometry.taps[0]:
            yield y, o, i


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 7), st.integers(1, 3))
@PROPERTY
def test_backward_meets_what_forward_met(space, taps, stride, padding, dilation):
    """Each pair of input and output at its tap, once; padding beyond the kernel too."""
    dilation = dilation if stride == 1 else 1
    reach = space + 2 * padding - dilation * (taps - 1)
    if reach < 1:
        return
    result = (reach - 1) // stride + 1
    geometry = Geometry((space,), (result,), (taps,), (stride,), (padding,), (dilation,))
    forward, backward = list(triples_of_forward(geometry)), list(triples_of_backward(geometry))
    assert len(set(forward)) == len(forward)
    assert sorted(backward) == sorted(forward)
    held = geometry.backward.count[0] * stride
    first = geometry.padding[0] - stride * geometry.first[0]
    assert 0 <= first < stride
    assert first + space <= held < first + space + stride


SHAPES = ((2, 4, 9, 9), (6, 4, 3, 3), (2, 6, 7, 7))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (([1, 1], [0, 0], [1, 1], False, [0, 0], 1), ((1, 1), (0, 0), (1, 1))),
        (([2], [1], [3], False, [0], 1), ((2, 2), (1, 1), (3, 3))),
        (([1, 1], [0, 0], [1, 1], True, [0, 0], 1), "no kernel computes transposed convolutions on codes"),
        (([1, 1], [0, 0], [1, 1], False, [0, 0], 4), "no kernel computes convolutions of 4 groups on codes"),
    ],
)
def test_numbers_of_a_call(numbers, expected):
    """One number stands for every dimension."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(aten.convolution.default, (x, w, None, *numbers))
    found = read_geometry(node, SHAPES)
    assert found == expected if isinstance(found, str) else (found.stride, found.padding, found.dilation) == expected


def test_the_windows_of_forward():
    geometry = Geometry((9,), (4,), (3,), (2,), (1,), (1,))
    reads = [[geometry.forward.start[0] + 2 * t + u for u in range(3)] for t in range(4)]
    padded = torch.arange(-1, 10).unfold(0, 3, 2)[:4]
    assert reads == padded.tolist()
    assert (geometry.forward.positions, geometry.forward.reads) == (4, 3)
