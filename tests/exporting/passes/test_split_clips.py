"""Clips and relus beside 4-bit quantizers become Max and Min."""

import pytest

from qcompiler.exporting.passes.split_clips import SplitClips

MODEL = """
g (float[2,4] x) => (int4[2,4] q, int4[2,4] r)
<float s = {0.5}, int4 z = {0}, float low = {0.0}, float high = {6.0}>
{
    c = Clip(x, low, high)
    q = QuantizeLinear(c, s, z)
    p = Relu(x)
    r = QuantizeLinear(p, s, z)
}"""


def test_golden_split_clips(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, SplitClips()) == 2
    golden(before=before, after=onnx_text(subject))


def test_a_relu_stays_at_the_first_code(parse_model, settle_onnx):
    """Where 0 is the first code, the quantizer cuts as the relu does."""
    subject = parse_model(MODEL.replace("int4 z = {0}", "int4 z = {-8}"))
    assert settle_onnx(subject, SplitClips()) == 1
    assert [node.op_type for node in subject.graph].count("Relu") == 1


def test_one_bound(parse_model, settle_onnx):
    subject = parse_model(MODEL.replace("Clip(x, low, high)", 'Clip(x, "", high)'))
    assert settle_onnx(subject, SplitClips()) == 2
    assert [node.op_type for node in subject.graph] == ["Min", "QuantizeLinear", "Max", "QuantizeLinear"]


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_eight_bits_stay(kind, parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace("int4", kind)), SplitClips()) == 0
