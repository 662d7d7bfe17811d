"""Barriers around what onnxruntime would compute on 4-bit codes."""

import pytest

from qcompiler.exporting.passes.shield_four_bits import ShieldFourBits

MODEL = """
g (int4[1,1,4,4] q) => (int4[1,1,2,2] y) <float s = {0.5}, int4 z = {0}, float[1,1,1,1] w = {1}>
{
    f = DequantizeLinear(q, s, z)
    h = Conv(f, w)
    p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (h)
    y = QuantizeLinear(p, s, z)
}"""


def test_golden_shield_four_bits(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, ShieldFourBits()) == 2
    golden(before=before, after=onnx_text(subject))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MaxPool <kernel_shape=[2,2], strides=[2,2]>", "Tanh"),  # the convolution alone
        ("h = Conv(f, w)", "t = Tanh(f)\n    h = Conv(t, w)"),  # the pool alone: the convolution reads floats
    ],
)
def test_one_of_both(old, new, parse_model, settle_onnx):
    text = MODEL.replace(old, new).replace("int4[1,1,2,2] y", "int4[N,C,H,W] y")
    assert settle_onnx(parse_model(text), ShieldFourBits()) == 1


def test_eight_bits_stay(parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace("int4", "int8")), ShieldFourBits()) == 0
