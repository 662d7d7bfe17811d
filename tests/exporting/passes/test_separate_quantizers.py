"""Barriers between quantizers that onnxruntime would merge."""

import pytest

from qcompiler.exporting.passes.separate_quantizers import SeparateQuantizers

MODEL = """
g (uint8[1,1,4,4] q) => (uint8[N,C,H,W] y) <float s = {0.5}, uint8 z = {0}, float other = {0.25}, float one = {1.0}>
{
    f = DequantizeLinear(q, s, z)
    h = Mul(f, one)
    r = Relu(h)
    y = QuantizeLinear(r, other, z)
}"""


def test_golden_separate_quantizers(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, SeparateQuantizers()) == 1
    golden(before=before, after=onnx_text(subject))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("QuantizeLinear(r, other, z)", "QuantizeLinear(r, s, z)"),  # the same codes again
        ("float one = {1.0}", "float one = {1.5}"),  # a factor that stays
        ("Relu(h)", "Sigmoid(h)"),
        ("Relu(h)", "MaxPool <kernel_shape=[2,2]> (h)"),
    ],
)
def test_others_stay(old, new, parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace(old, new)), SeparateQuantizers()) == 0
