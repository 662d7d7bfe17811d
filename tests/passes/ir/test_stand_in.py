"""Empty tensors of which only the shape is read."""

import torch
from torch import nn

from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.stand_in import is_stand_in, stand_in
from qcompiler.passes.ir.views import aten


def test_shape_strides_and_type_are_those_of_the_tensor(joint):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    captured = joint(nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), x)
    target = aten.max_pool2d_with_indices_backward.default
    (node,) = captured.module.graph.find_nodes(op="call_function", target=target)
    source = node.args[1]
    assert stand_in(node, 1) == 1
    empty = node.args[1]
    assert is_stand_in(empty)
    assert not is_stand_in(source)
    assert get_value(empty).shape == get_value(source).shape
    assert get_value(empty).stride() == get_value(source).stride()
    assert get_value(empty).dtype is torch.float64
    assert empty.meta["partitioner_tag"] == "must_be_in_backward"
    assert is_backward(node)
    assert stand_in(node, 1) == 0
