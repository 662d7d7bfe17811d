"""Max pools with ceil_mode, as torch counts their windows."""

import pytest
import torch

from qcompiler.exporting.passes.close_windows import CloseWindows
from qcompiler.exporting.trace import ExportError

MODEL = """
g (float[1,1,{size},4] x) => (float[N,C,H,W] y)
{{
    y = MaxPool <kernel_shape=[{kernel},1], strides=[{stride},1], pads=[{pad},0,{pad},0], ceil_mode=1> (x)
}}"""


def test_golden_close_windows(parse_model, settle_onnx, onnx_text, golden):
    subject = parse_model(MODEL.format(size=4, kernel=2, stride=3, pad=1))
    before = onnx_text(subject)
    assert settle_onnx(subject, CloseWindows()) == 1
    golden(before=before, after=onnx_text(subject))


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7])
def test_as_many_windows_as_torch(size, parse_model, settle_onnx):
    """(size + padding in front and behind − kernel) / stride + 1, rounded down once ceil_mode is off, up otherwise."""
    subject = parse_model(MODEL.format(size=size, kernel=2, stride=3, pad=1))
    settle_onnx(subject, CloseWindows())
    (node,) = subject.graph
    front, _, behind, _ = node.attributes["pads"].as_ints()
    whole, rest = divmod(size + front + behind - 2, 3)
    count = whole + 1 + (rest > 0 and bool(node.attributes["ceil_mode"].as_int()))
    assert count == torch.max_pool2d(torch.zeros(1, 1, size, 1), (2, 1), (3, 1), (1, 0), ceil_mode=True).shape[2]


def test_pools_on_which_both_agree_stay(parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL.format(size=5, kernel=2, stride=2, pad=0)), CloseWindows()) == 0
    without = MODEL.format(size=4, kernel=2, stride=3, pad=1).replace("ceil_mode=1", "ceil_mode=0")
    assert settle_onnx(parse_model(without), CloseWindows()) == 0


def test_a_free_dimension(parse_model):
    subject = parse_model(MODEL.format(size="free", kernel=2, stride=3, pad=1))
    with pytest.raises(ExportError, match="export: n0: ceil_mode over a free dimension"):
        CloseWindows()(subject)
    agree = parse_model(MODEL.format(size="free", kernel=3, stride=2, pad=1))
    assert CloseWindows()(agree) == 0
