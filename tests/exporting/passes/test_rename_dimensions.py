"""Free dimensions get the names of the user."""

from qcompiler.exporting.passes.rename_dimensions import RenameDimensions

MODEL = """
g (float[s0,4] x, float[s1,4] z) => (float[s0,4] y, float[s1,4] u)
{
    y = Relu(x)
    u = Relu(z)
}"""


def test_golden_rename_dimensions(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    subject.symbols = {"s0": "batch"}
    before = onnx_text(subject)
    assert settle_onnx(subject, RenameDimensions()) == 2
    golden(before=before, after=onnx_text(subject))


def test_names_that_are_symbols_of_others(parse_model, settle_onnx):
    """All names are put in at once, and once."""
    subject = parse_model(MODEL)
    subject.symbols = {"s0": "s1", "s1": "s0"}
    assert settle_onnx(subject, RenameDimensions()) == 4
    values = (*subject.graph.inputs, *subject.graph.outputs)
    assert [str(value.shape[0]) for value in values] == ["s1", "s0", "s1", "s0"]


def test_without_names_all_stay(parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL), RenameDimensions()) == 0
    other = parse_model(MODEL)
    other.symbols = {"s": "batch", "s00": "rows"}
    assert settle_onnx(other, RenameDimensions()) == 0
