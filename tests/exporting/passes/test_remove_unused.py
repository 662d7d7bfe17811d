"""What nothing reads goes."""

from qcompiler.exporting.passes.remove_unused import RemoveUnused

MODEL = """
g (float[2,4] x) => (float[2,4] y) <float one = {1.0}, float two = {2.0}>
{
    a = Mul(x, two)
    b = Relu(a)
    y = Mul(x, one)
}"""


def test_golden_remove_unused(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, RemoveUnused()) == 3  # two nodes and a constant
    assert list(subject.graph.initializers) == ["one"]
    golden(before=before, after=onnx_text(subject))


def test_all_is_read(parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace("Mul(x, one)", "Mul(b, one)")), RemoveUnused()) == 0
