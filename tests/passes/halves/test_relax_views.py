"""Views of saved tensors take any strides."""

import torch
from torch import nn

from qcompiler.passes.halves.relax_views import RelaxViews
from qcompiler.passes.ir.views import aten


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_golden_relax(in_front_of, settle_halves, text, golden):
    halves = in_front_of(
        RelaxViews, "identity", nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), leaf(3, 2, 2)
    )
    before = text(halves)
    assert "aten.view" in before
    assert settle_halves(halves, RelaxViews()) == before.count("aten.view")
    assert not any(half.graph.find_nodes(op="call_function", target=aten.view.default) for half in halves.graphs)
    golden(before=before, after=text(halves))


def test_does_not_fire_without_views(in_front_of, settle_halves):
    halves = in_front_of(RelaxViews, "identity", nn.ReLU(), leaf(3, 2))
    assert settle_halves(halves, RelaxViews()) == 0
