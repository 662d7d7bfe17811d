"""The text of an ONNX graph: a line for everything in it, whatever kind it is."""

import onnx
import onnx_ir as ir
import pytest

from qcompiler.exporting.text import model_text

HEAD = '<ir_version: 10, opset_import: ["" : 21, "own" : 1]>'


def read_model(text):
    return ir.from_proto(onnx.parser.parse_model(HEAD + text))


def test_golden_model_text(golden):
    """Free dimensions, several results, a missing input, attributes of all kinds, a graph in a node, a function."""
    model = read_model("""
g (float[batch,8] x, bool flag) => (float[batch,4] y, float[batch,4] z)
<float[5] w = {0.5, -1.25, 3.0, 1e30, 2.0}, int64[1] axes = {1}, string[1] word = {"a b"}>
{
    a, b = Split <axis = 1, num_outputs = 2> (x)
    c = Clip(a, , )
    e = Constant <value = float[2] {1.0, 2.5}> ()
    p = MaxPool <kernel_shape = [2], auto_pad = "VALID"> (a)
    y = If (flag) <
        then_branch = g1 () => (float[batch,4] t) { t = Relu(b) },
        else_branch = g2 () => (float[batch,4] u) { u = own.Twice(b) }
    >
    z = own.Twice(c)
}
<domain: "own", opset_import: ["" : 21]> Twice (x) => (y) { y = Add(x, x) }""")
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    golden(text=model_text(model))


def test_nothing_is_computed_twice_or_changed():
    model = read_model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    before = ir.to_proto(model).SerializeToString()
    text = model_text(model)
    assert text == model_text(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert text == "%x : FLOAT[2] = input\n%y : FLOAT[2] = Relu(%x)\nreturn [%y]\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = Relu(x)", "y = Abs(x)"),
        ("float[2] x", "float[3] x"),
        ("float[2] y", "double[2] y"),
        ("w = {1.0, 2.0}", "w = {1.0, 2.5}"),
        ("Add(x, w)", "Add(w, x)"),
        ("<alpha = 0.5>", "<alpha = 0.25>"),
    ],
)
def test_every_difference_is_a_difference_of_the_text(old, new):
    text = """
g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
{
    u = Add(x, w)
    v = LeakyRelu <alpha = 0.5> (u)
    y = Relu(x)
}"""
    assert text.replace(old, new) != text
    assert model_text(read_model(text.replace(old, new))) != model_text(read_model(text))
