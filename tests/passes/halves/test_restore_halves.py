"""restore-halves: operators of both halves read the strides that they were traced with."""

import torch
from torch import nn

from qcompiler.passes.halves.restore_halves import RestoreHalves
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_a_tensor_of_backward_gets_its_strides_back(in_front_of, settle_halves, function):
    """The cosine in backward is written column by column; its reader has seen rows."""
    halves = in_front_of(RestoreHalves, "identity", function(lambda m, x: x.sin()), leaf(3, 4))
    graph = halves.backward.graph
    (cosine,) = graph.find_nodes(op="call_function", target=aten.cos.default)
    with graph.inserting_after(cosine):
        turned = graph.call_function(ops.LAY_OUT, (cosine, [1, 3]))
    infer_value(turned)
    cosine.replace_all_uses_with(turned, lambda user: user is not turned)
    assert settle_halves(halves, RestoreHalves()) == 1
    (product,) = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert [get_value(source).stride() for source in product.all_input_nodes] == [(4, 1), (4, 1)]


def test_halves_of_dense_tensors_have_their_strides(in_front_of, settle_halves):
    halves = in_front_of(RestoreHalves, "hyperblock-int8", nn.Conv2d(2, 2, 3), leaf(1, 2, 4, 4))
    assert settle_halves(halves, RestoreHalves()) == 0


def test_does_not_fire_on_a_graph_that_is_one_half(in_front_of, settle_halves):
    model = nn.Conv2d(2, 2, 3).requires_grad_(False)
    halves = in_front_of(RestoreHalves, "hyperblock-int8", model, torch.randn(1, 2, 4, 4))
    assert settle_halves(halves, RestoreHalves()) == 0
