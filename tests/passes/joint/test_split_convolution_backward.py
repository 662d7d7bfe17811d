"""split-convolution-backward: one product a node, bit for bit the same gradients."""

import operator

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.stand_in import is_stand_in
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward

SPLIT = SplitConvolutionBackward()

#: name → (module, shape of its input)
CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 4, 3), (2, 2, 5, 5)),
    "no bias": (nn.Conv2d(2, 4, 3, bias=False), (2, 2, 5, 5)),
    "strided, padded, dilated": (nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2), (2, 2, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, stride=2), (2, 2, 4, 4)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 4, 4)),
    "1d": (nn.Conv1d(2, 4, 3), (2, 2, 7)),
    "3d": (nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
}


def gradients(captured):
    """The masks [input, weight, bias] of every gradient of a convolution, in graph order."""
    nodes = captured.module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return [node.args[-1] for node in nodes]


def test_golden_split(joint, settle, golden):
    captured = joint(nn.Conv2d(1, 2, 2), torch.randn(1, 1, 3, 3, requires_grad=True))
    before = graph_text(captured.module)
    assert settle(captured, SPLIT) == 1
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_are_bitwise_those_of_the_whole(name, joint, settle, run_graph, same_bits):
    module, shape = CONVOLUTIONS[name]
    captured = joint(module, torch.randn(shape, requires_grad=True))
    whole = run_graph(captured)
    assert settle(captured, SPLIT) == 1
    bias = module.bias is not None
    assert gradients(captured) == [[False, True, bias], [True, False, False]]
    assert same_bits(run_graph(captured), whole)


@pytest.mark.parametrize(
    ("weight", "needs_input", "mask", "argument"),
    [(True, False, [False, True, True], 2), (False, True, [True, False, True], 1)],
)
def test_a_gradient_of_one_operand_only_loses_the_other(
    weight, needs_input, mask, argument, joint, settle, run_graph, same_bits
):
    model = nn.Conv2d(2, 4, 3)
    model.weight.requires_grad_(weight)
    captured = joint(model, torch.randn(2, 2, 5, 5, requires_grad=needs_input))
    whole = run_graph(captured)
    assert settle(captured, SPLIT) == 1
    assert gradients(captured) == [mask]
    assert same_bits(run_graph(captured), whole)
    (node,) = captured.module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert [is_stand_in(node.args[i]) for i in (1, 2)] == [argument == 1, argument == 2]


def test_the_stand_in_has_the_strides_of_its_operand_and_is_made_in_backward(joint, settle):
    x = torch.randn(2, 2, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    captured = joint(nn.Conv2d(2, 4, 3), x)
    settle(captured, SPLIT)
    graph = captured.module.graph
    weight, of_input = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert get_value(of_input.args[1]).stride() == x.stride() != get_value(weight.args[2]).stride()
    assert all(is_backward(node) for node in graph.find_nodes(op="call_function", target=aten.empty_strided.default))


@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
def test_results_keep_their_strides_for_every_pairing(input_format, weight_format, grad_format, joint, settle):
    x = torch.randn(2, 2, 5, 5).contiguous(memory_format=input_format).requires_grad_()
    module = nn.Conv2d(2, 4, 3).to(memory_format=weight_format)
    captured = joint(lambda x: module(x).clone(memory_format=grad_format), x)
    before = {node.name: get_value(node).stride() for node in results(captured)}
    settle(captured, SPLIT)
    for node in results(captured):
        infer_value(node.args[0])
        assert get_value(node.args[0])[node.args[1]].stride() == before[node.name]


def results(captured):
    """What is taken out of the gradients of convolutions."""
    found = captured.module.graph.find_nodes(op="call_function", target=operator.getitem)
    return [node for node in found if node.args[0].target is aten.convolution_backward.default]


def test_several_gradients(joint, settle, run_graph, same_bits):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    captured = joint(model, torch.randn(2, 2, 6, 6, requires_grad=True))
    whole = run_graph(captured)
    assert settle(captured, SPLIT) == 2
    assert same_bits(run_graph(captured), whole)


def frozen_but_for_its_bias():
    model = nn.Conv2d(2, 4, 3)
    model.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "shape"), [(nn.Linear(3, 2), (2, 3)), (frozen_but_for_its_bias(), (2, 2, 5, 5))], ids=["linear", "bias"]
)
def test_does_not_fire_without_a_product(model, shape, joint, settle):
    captured = joint(model, torch.randn(shape))
    before = graph_text(captured.module)
    assert settle(captured, SPLIT) == 0
    assert graph_text(captured.module) == before
