"""Biases that onnxruntime would round are subtracted behind their layer."""

import pytest

from qcompiler.exporting.passes.split_biases import SplitBiases

MODEL = """
g (uint8[2,4] q) => (float[2,3] y)
<float s = {0.5}, uint8 z = {0}, int8[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12},
 float[3,4] v = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1.1,2,3}>
{
    x = DequantizeLinear(q, s, z)
    f = DequantizeLinear(w, s)
    y = Gemm <transB=1> (x, f, b)
}"""
WHOLE = MODEL.replace("{1.1,2,3}", "{1.25,2,3}")
FLOAT = MODEL.replace("(x, f, b)", "(x, v, b)")


def test_golden_split_biases(parse_model, settle_onnx, onnx_text, golden):
    """1.1 is no multiple of 0.5 · 0.5."""
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, SplitBiases()) == 1
    assert subject.float_biases == ["n2"]
    golden(before=before, after=onnx_text(subject))


def test_golden_split_biases_of_a_float_weight(parse_model, settle_onnx, onnx_text, golden):
    """A difference, or a barrier where there is no bias."""
    subject, bare = parse_model(FLOAT), parse_model(FLOAT.replace(", b)", ")"))
    for one in (subject, bare):
        assert settle_onnx(one, SplitBiases()) == 1
        assert one.float_biases == []
    golden(difference=onnx_text(subject), barrier=onnx_text(bare))


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        MODEL.replace("(x, f, b)", "(x, f)"),
        MODEL.replace("x = DequantizeLinear(q, s, z)", "c = DequantizeLinear(q, s, z)\n    x = Tanh(c)"),
    ],
)
def test_others_stay(text, parse_model, settle_onnx):
    subject = parse_model(text)
    assert settle_onnx(subject, SplitBiases()) == 0
    assert subject.float_biases == []


def test_beta_makes_a_whole_bias_another_number(parse_model, settle_onnx):
    assert settle_onnx(parse_model(WHOLE.replace("<transB=1>", "<transB=1, beta=0.3>")), SplitBiases()) == 1
