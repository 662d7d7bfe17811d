"""The check after each pass over an ONNX model: every value is there before its reader."""

import onnx_ir as ir
import pytest

from qcompiler.exporting.exported_model import ExportedModel, StructureError, verify_structure


@pytest.fixture
def subject():
    """Two nodes in a row."""
    x = ir.Value(name="x")
    first = ir.node("Relu", [x], name="first")
    last = ir.node("Neg", first.outputs, name="last")
    graph = ir.Graph([x], last.outputs, nodes=[first, last], opset_imports={"": 21}, name="g")
    return ExportedModel(ir.Model(graph, ir_version=10))


def test_a_graph_in_order(subject):
    verify_structure(subject)


def test_a_value_that_is_computed_later(subject):
    first, last = subject.graph
    last.replace_input_with(0, subject.graph.inputs[0])
    first.replace_input_with(0, last.outputs[0])
    with pytest.raises(StructureError, match=r"^first: reads .*, which nothing in front computes"):
        verify_structure(subject)


def test_a_value_of_no_graph(subject):
    list(subject.graph)[1].replace_input_with(0, ir.Value(name="lost"))
    with pytest.raises(StructureError, match=r"^last: reads lost"):
        verify_structure(subject)


def test_an_output_of_no_node(subject):
    subject.graph.outputs[0] = ir.Value(name="lost")
    with pytest.raises(StructureError, match=r"^output lost: nothing computes it"):
        verify_structure(subject)


def test_a_graph_inside_of_a_node(subject):
    """It reads the values around it, and its own."""
    first = next(iter(subject.graph))
    inner = ir.node("Abs", [first.outputs[0]], name="inner")
    branch = ir.Graph([], inner.outputs, nodes=[inner], name="branch")
    node = ir.node("If", [subject.graph.inputs[0]], {"then_branch": branch}, name="if")
    subject.graph.append(node)
    verify_structure(subject)
    inner.replace_input_with(0, ir.Value(name="lost"))
    with pytest.raises(StructureError, match=r"^inner: reads lost"):
        verify_structure(subject)
