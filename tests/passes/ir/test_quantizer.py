"""Quantizers as passes see them: fields by name, and each change with its values inferred."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.quantizer import Quantizer, insert_quantizer, list_dequantizers, list_quantizers
from qcompiler.passes.ir.verify import VerifyError, verify_graph
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import find_dequantizer, find_quantizer, find_source, get_dequantizer, iterate_readers
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

AFFINE = "affine8:real:tensor:stochastic:pass"


@pytest.fixture
def quantized(joint):
    """quantized(spec) → a joint graph of a linear layer with a quantizer in front of relu, and that quantizer."""

    def make(text=AFFINE):
        captured = joint(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4, requires_grad=True))
        graph = captured.module.graph
        (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
        tensor = relu.all_input_nodes[0]
        relu.replace_input_with(tensor, insert_quantizer(tensor, relu, parse_spec(text), "bc", "0/output"))
        (quantizer,) = list_quantizers(graph)
        return captured.module, quantizer

    return make


def test_fields(quantized):
    module, quantizer = quantized()
    node = quantizer.codes
    fields = (quantizer.tensor, quantizer.scale, quantizer.zero_point, quantizer.key, quantizer.text)
    assert (*fields, quantizer.layout, quantizer.site) == node.args
    assert str(quantizer.spec) == quantizer.text == AFFINE
    (reader,) = quantizer.dequantizers
    own = (reader.codes, reader.scale, reader.zero_point, reader.text, reader.layout, reader.dtype)
    assert own == reader.floats.args
    assert (reader.shown, get_value(reader.floats).dtype) == (None, torch.float32)
    verify_graph(module)


def test_without_zero_point_and_key(quantized):
    module, quantizer = quantized("int8:fit:tensor:nearest:pass")
    assert (quantizer.zero_point, quantizer.key) == (None, None)
    verify_graph(module)


def test_respecify_infers_every_shape_again(quantized):
    module, quantizer = quantized()
    quantizer.respecify(parse_spec("affine4:real:c1:stochastic:pass"), "0/output.turned")
    assert quantizer.site == "0/output.turned"
    assert {tuple(get_value(node).shape) for node in (quantizer.scale, quantizer.zero_point)} == {(2, 3)}
    assert {reader.text for reader in quantizer.dequantizers} == {quantizer.text}
    verify_graph(module)


def test_a_reader_that_shows_another_tensor_is_refused(quantized):
    module, quantizer = quantized()
    (reader,) = quantizer.dequantizers
    reader.show(quantizer.tensor)
    verify_graph(module)
    reader.show(module.graph.find_nodes(op="placeholder")[0])
    with pytest.raises(VerifyError, match="not the tensor of its codes"):
        verify_graph(module)
    reader.show(None)
    assert len(reader.floats.args) == 6


def test_write_beside_and_remove(quantized):
    module, quantizer = quantized()
    other = quantizer.write_beside(quantizer.tensor, "cb")
    (reader,) = quantizer.dequantizers
    reader.floats.replace_all_uses_with(other.insert_dequantizer(torch.float32, reader.floats))
    module.graph.erase_node(reader.floats)
    quantizer.remove()
    assert [one.codes for one in list_quantizers(module.graph)] == [other.codes]
    assert (other.layout, other.site) == ("cb", "0/output")
    verify_graph(module)


def test_a_dequantizer_of_backward_is_pinned_there(quantized):
    module, quantizer = quantized()
    (reader,) = (node for node in module.graph.nodes if node.target is aten.threshold_backward.default)
    floats = quantizer.insert_dequantizer(torch.float32, reader)
    assert is_backward(floats)
    assert [one.floats for one in list_dequantizers(module.graph)].count(floats) == 1


def test_the_way_back_to_the_quantizer(quantized):
    module, quantizer = quantized("int4:fit:tensor:nearest:pass")
    (reader,) = quantizer.dequantizers
    floats = reader.floats
    view = insert_call(module.graph, aten.t.default, (floats,), after=floats)
    assert find_quantizer(view) == find_quantizer(floats) == quantizer
    assert find_dequantizer(view) == reader
    assert get_dequantizer(view) is None
    assert find_quantizer(quantizer.tensor) is find_quantizer(2.0) is None
    packed = insert_call(module.graph, ops.PACK, (quantizer.codes, 4), after=quantizer.codes)
    whole = insert_call(module.graph, ops.UNPACK, (packed, [2, 3], 4, True), after=packed)
    reader.change(codes=whole)
    assert find_quantizer(view) == quantizer
    assert [one.floats for one in iterate_readers(quantizer.codes)] == [floats]


def test_an_input_has_no_quantizer(quantized):
    _, quantizer = quantized()
    assert find_source(quantizer.codes.graph.find_nodes(op="placeholder")[0]) is None
    assert find_source(quantizer.codes) == Quantizer(quantizer.codes)
