"""Barriers behind operators whose kernels on codes give other numbers."""

import pytest

from qcompiler.exporting.passes.shield_float_kernels import ShieldFloatKernels

MODEL = """
g (uint8[1,1,4,4] q) => (uint8[N,C,H,W] y) <float s = {0.5}, uint8 z = {0}, float other = {0.25}>
{
    f = DequantizeLinear(q, s, z)
    h = Softmax <axis=-1> (f)
    y = QuantizeLinear(h, other, z)
}"""


def test_golden_shield_float_kernels(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, ShieldFloatKernels()) == 1
    golden(before=before, after=onnx_text(subject))


POOL = "AveragePool <kernel_shape=[2,2], strides=[1,1]{}> (f)"


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        (POOL.format(", ceil_mode=1"), 1),
        (POOL.format(", dilations=[2,1]"), 1),
        (POOL.format(", dilations=[1,1], ceil_mode=0"), 0),
        ("Sigmoid(f)", 0),  # a table of 256 numbers is exact
    ],
)
def test_by_operator(operator, count, parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace("Softmax <axis=-1> (f)", operator)), ShieldFloatKernels()) == count


def test_floats_stay(parse_model, settle_onnx):
    """Behind an operator that is kept, nothing is computed on codes."""
    subject = parse_model(MODEL.replace("h = Softmax", "t = Tanh(f)\n    h = Softmax").replace("> (f)", "> (t)"))
    assert settle_onnx(subject, ShieldFloatKernels()) == 0
