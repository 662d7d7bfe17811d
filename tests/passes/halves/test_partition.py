"""The joint graph in two: what forward saves is what backward takes first."""

import pytest
import torch
from torch import nn

from qcompiler.compiler import torch_compat
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.partition import Partition
from qcompiler.passes.ir.meta import has_value


def leaf():
    return torch.randn(3, 4, requires_grad=True)


@pytest.fixture
def step():
    return Partition(torch_compat.split_joint)


def test_golden_partition(in_front_of, settle_halves, step, text, golden):
    halves = in_front_of(Partition, "hyperblock-int4", nn.Sequential(nn.Linear(4, 4), nn.ReLU()), leaf())
    before = text(halves)
    assert settle_halves(halves, step) == 1
    golden(before=before, after=text(halves))


def test_saved_nodes_are_the_first_inputs_of_backward(in_front_of, settle_halves, step):
    halves = in_front_of(Partition, "hyperblock-int8", nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), leaf())
    settle_halves(halves, step)
    given = [node.name for node in halves.backward.graph.find_nodes(op="placeholder")]
    assert given[: len(halves.saved)] == [node.name for node in halves.saved]
    assert all(has_value(node) for half in halves.graphs for node in half.graph.nodes if node.op == "call_function")


def test_does_not_fire_on_a_graph_without_gradients(joint, step):
    with torch.no_grad():
        captured = joint(nn.Linear(4, 2), torch.randn(3, 4))
    halves = Halves.of_forward(captured.module, captured.forward_outputs)
    assert step(halves) == 0
    assert halves.saved == []
