"""States after forward are outputs of forward, those after backward stand at the end."""

import torch
from torch import nn

from qcompiler.passes.halves.order_outputs import OrderOutputs
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.meta import is_backward
from qcompiler.runtime import ops


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def test_golden_order(in_front_of, settle_halves, text, golden):
    halves = in_front_of(OrderOutputs, "in-hindsight-w8a8g8", nn.Linear(4, 2), leaf())
    before = text(halves).splitlines()[-1]
    assert settle_halves(halves, OrderOutputs()) > 0
    golden(before=before + "\n", after=text(halves).splitlines()[-1] + "\n")
    states = [node for node in list_outputs(halves.joint.graph) if node is not None and node.target is ops.UPDATE]
    first = list_outputs(halves.joint.graph)[: halves.outputs]
    assert [node for node in states if node in first] == [node for node in states if not is_backward(node)]
    assert halves.outputs - halves.user_outputs == sum(not is_backward(state) for state in states) > 0


def test_does_not_fire_without_states(in_front_of, settle_halves):
    halves = in_front_of(OrderOutputs, "hyperblock-int8", nn.Linear(4, 2), leaf())
    assert settle_halves(halves, OrderOutputs()) == 0
    assert halves.outputs == halves.user_outputs == 1
