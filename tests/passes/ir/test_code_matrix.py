"""Which rows of an operand share a scale, through views."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.code_matrix import read_matrix
from qcompiler.passes.ir.meta import get_contraction, iterate_contractions
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.hoist_views import HoistViews


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def describe(side):
    """Extent, edge, number of views; of an operand with several scales in a sum also run and order."""
    runs = (side.run, side.turned) if side.run else ()
    return side.extent, side.edge, len(side.views), *runs


@pytest.fixture
def edges(placed, apply):
    """edges(spec of the input, spec of the weight, model, input) → what `read_matrix` says of the forward product."""

    def of(input_spec, weight_spec, model, x):
        captured = placed("", model, x, activation=input_spec, weight=weight_spec)
        apply(captured, HoistViews())
        node, _ = next(pair for pair in iterate_contractions(captured.module.graph) if not pair[1].is_bias)
        first, second = (0, 1) if node.target is aten.mm.default else (1, 2)
        assert get_contraction(node).gradient_of is None
        found = (read_matrix(node.args[first], 0), read_matrix(node.args[second], 1))
        return tuple(side if isinstance(side, str) else describe(side) for side in found)

    return of


def spec(block):
    return f"int8:fit:{block}:nearest:pass"


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("tensor", (6, 6, 0)),
        ("c*", (6, 1, 0)),
        ("b2c*", (6, 2, 0)),
        ("b4c*", (6, 4, 0)),  # 6 rows: the last block is smaller
        ("b*c2", (6, 6, 0, 2, False)),
        ("b4c3", (6, 4, 0, 3, False)),  # 4 channels: the last run is shorter too
        ("each", (6, 1, 0, 1, False)),
    ],
)
def test_rows_of_an_input(block, found, edges):
    assert edges(spec(block), spec("tensor"), nn.Linear(4, 5), leaf(6, 4))[0] == found


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("tensor", (5, 5, 1)),
        ("i*", (5, 1, 1)),
        ("o2i*", (5, 2, 1)),
        ("o*", (5, 5, 1, 1, False)),
        ("o2i3", (5, 2, 1, 3, False)),
    ],
)
def test_columns_of_a_weight(block, found, edges):
    """A weight [out, in] is read through `t`."""
    assert edges(spec("tensor"), spec(block), nn.Linear(4, 5), leaf(6, 4))[1] == found


@pytest.mark.parametrize(
    ("block", "found"),
    [("b2c3", (4, 2, 1, 3, True)), ("b4c*", (4, 4, 1)), ("b*c4", (4, 4, 1, 4, False)), ("each", (4, 1, 1, 1, True))],
)
def test_runs_of_a_batch(block, found, edges):
    """x.t() @ … sums over the first dimension of [6, 4], so the scales lie in the order of runs; rows are the batch."""
    assert edges(spec(block), spec("tensor"), Samples(), leaf(6, 4))[0] == found


def test_tokens_are_rows(edges):
    """[batch, time, channels] is flattened: a scale a token is a scale a row."""
    assert edges(spec("c*"), spec("tensor"), nn.Linear(4, 5), leaf(2, 3, 4))[0] == (6, 1, 1)


def test_scales_in_another_order(edges):
    """Rows that a view has turned since they were quantized: [2, 3, 4] → [3, 2, 4] → [6, 4]."""
    model = Turned()
    assert edges(spec("tensor"), spec("tensor"), model, leaf(2, 3, 4))[0] == (6, 6, 3)
    text = "the scales of block c* are not in the order of its rows"
    assert edges(spec("c*"), spec("tensor"), model, leaf(2, 3, 4))[0] == text
    text = "the scale of block c2 changes along the summed axis"
    assert edges(spec("c2"), spec("tensor"), model, leaf(2, 3, 4))[0] == text


class Samples(nn.Module):
    """A product that sums over samples, as a weight gradient does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return x.t() @ self.weight


class Turned(nn.Module):
    """A product of rows in another order than that of the input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return x.transpose(0, 1).reshape(6, 4) @ self.weight
