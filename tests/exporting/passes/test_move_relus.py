"""Relus move from behind a view to their linear layer."""

import pytest

from qcompiler.exporting.passes.move_relus import MoveRelus

MODEL = """
g (float[6,4] x) => (float[2,3,4] y)
<float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, int64[3] shape = {2,3,4},
 float low = {0.0}, float high = {6.0}>
{
    h = Gemm(x, w)
    v = Reshape(h, shape)
    y = Relu(v)
}"""


def test_golden_move_relus(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, MoveRelus()) == 1
    golden(before=before, after=onnx_text(subject))


def test_a_clip_moves_alike(parse_model, settle_onnx):
    subject = parse_model(MODEL.replace("Relu(v)", "Clip(v, low, high)"))
    assert settle_onnx(subject, MoveRelus()) == 1
    assert [node.op_type for node in subject.graph][-2:] == ["Clip", "Reshape"]


@pytest.mark.parametrize(("old", "new"), [("Gemm", "MatMul"), ("Relu", "Tanh"), ("Reshape(h, shape)", "Tanh(h)")])
def test_others_stay(old, new, parse_model, settle_onnx):
    subject = parse_model(MODEL.replace(old, new).replace("float[2,3,4] y", "float[N,M,K] y"))
    assert settle_onnx(subject, MoveRelus()) == 0
