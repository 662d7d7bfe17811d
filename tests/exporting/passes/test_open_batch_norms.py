"""Batch norms behind decoded weights are written as −x · −α + β′."""

import numpy as np
import pytest

from qcompiler.exporting.passes.open_batch_norms import OpenBatchNorms

MODEL = """
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
<float[2,1,1,1] levels = {1,2}, float[2,1,1,1] s = {0.5,2}, uint8[2,1,1,1] w = {1,2}, float one = {1.0},
 float[2] gamma = {2,-3}, float[2] beta = {1,2}, float[2] mean = {0.5,1}, float[2] var = {0.25,4}>
{
    f = Pow(levels, s)
    h = Conv(x, f)
    y = BatchNormalization <epsilon=0.0> (h, gamma, beta, mean, var)
}"""


def test_golden_open_batch_norms(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL)
    before = onnx_text(subject)
    assert settle_onnx(subject, OpenBatchNorms()) == 1
    golden(before=before, after=onnx_text(subject))


def test_the_numbers(parse_model, settle_onnx):
    """α = γ/√variance = 4 and −1.5; β′ = β − mean · α = −1 and 3.5."""
    subject = parse_model(MODEL)
    settle_onnx(subject, OpenBatchNorms())
    held = {name: value.const_value.numpy().flatten() for name, value in subject.graph.initializers.items()}
    np.testing.assert_array_equal(held["n2/negative_scale"], [-4, 1.5])
    np.testing.assert_array_equal(held["n2/shift"], [-1, 3.5])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Pow(levels, s)", "DequantizeLinear(w, one)"),  # not decoded when the file is loaded
        ("h = Conv(x, f)", "h = Conv(x, levels)"),  # a float weight
        ("h = Conv(x, f)", "c = Conv(x, f)\n    h = Relu(c)"),  # not behind the layer
    ],
)
def test_others_stay(old, new, parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.replace(old, new)), OpenBatchNorms()) == 0
