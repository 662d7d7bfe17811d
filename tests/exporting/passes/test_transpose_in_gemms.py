"""Transpositions of stored weights become part of their Gemm."""

import pytest

from qcompiler.exporting.passes.transpose_in_gemms import TransposeInGemms

MODEL = """
g (float[2,4] x) => (float[2,3] y)
<uint8[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float s = {0.5}, uint8 z = {128}, float[3] b = {1,2,3}>
{
    f = DequantizeLinear(w, s, z)
    t = Transpose <perm=[1,0]> (f)
    y = Gemm(x, t, b)
}"""


def test_golden_transpose_in_gemms(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, TransposeInGemms()) == 1
    golden(before=before, after=onnx_text(subject))


def test_a_matmul_becomes_a_gemm(parse_model, settle_onnx):
    subject = parse_model(MODEL.replace("Gemm(x, t, b)", "MatMul(x, t)"))
    assert settle_onnx(subject, TransposeInGemms()) == 1
    assert [node.op_type for node in subject.graph][-1] == "Gemm"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("f = DequantizeLinear(w, s, z)", "f = Cast <to=1> (w)"),  # no codes for onnxruntime to find
        ("Gemm(x, t, b)", "Gemm <transB=1> (t, x)"),  # the weight is the left operand
        ("float[2,4] x) => (float[2,3] y)", "float[1,2,4] x) => (float[1,2,3] y)"),
    ],
)
def test_other_contractions_stay(old, new, parse_model, settle_onnx):
    text = MODEL.replace(old, new)
    subject = parse_model(text.replace("Gemm(x, t, b)", "MatMul(x, t)") if "1,2,4" in new else text)
    assert settle_onnx(subject, TransposeInGemms()) == 0
