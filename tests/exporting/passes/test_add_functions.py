"""Functions that nodes call become part of the model."""

from qcompiler.exporting.functions import DOMAIN
from qcompiler.exporting.passes.add_functions import AddFunctions

MODEL = """
g (float[2,4] x, int64[1] axes) => (float[2,1] y)
{
    a = qcompiler.RangeScale(x, axes)
    b = qcompiler.RangeScale(x, axes)
    e = qcompiler.SharedExponent(x, axes)
    f = qcompiler.ExponentFactor(e)
    c = Add(a, b)
    y = Add(c, f)
}"""


def test_golden_add_functions(parse_model, settle_onnx, golden):
    subject = parse_model(MODEL)
    assert settle_onnx(subject, AddFunctions()) == 3
    names = [f"{domain}.{name}" for domain, name, _ in subject.model.functions]
    golden(functions="\n".join(names) + "\n", opsets=f"{dict(sorted(subject.graph.opset_imports.items()))}\n")


def test_a_function_has_the_version_of_the_model(parse_model):
    subject = parse_model(MODEL)
    subject.graph.opset_imports[""] = 22
    AddFunctions()(subject)
    assert {function.opset_imports[""] for function in subject.model.functions.values()} == {22}


def test_without_calls_there_are_none(parse_model, settle_onnx):
    subject = parse_model("g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
    assert settle_onnx(subject, AddFunctions()) == 0
    assert DOMAIN not in subject.graph.opset_imports
