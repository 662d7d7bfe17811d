"""Stand-ins become stored codes, QuantizeLinear, or functions."""

import pytest
import torch
from torch import nn

from qcompiler.exporting.passes.lower_quantizers import LowerQuantizers

DOMAIN = "qcompiler"


def make(translated, recipe):
    return translated(recipe, nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))


@pytest.mark.parametrize("recipe", ["in-hindsight-w8a8g8", "hyperblock-int8"])
def test_golden_lower_quantizers(recipe, translated, settle_onnx, onnx_text, golden):
    subject = make(translated, recipe)
    before = onnx_text(subject)
    assert settle_onnx(subject, LowerQuantizers()) == len(subject.quantizers)
    golden(before=before, after=onnx_text(subject))


def test_what_the_file_tells(translated, settle_onnx):
    subject = make(translated, "in-hindsight-w8a8g8")
    assert settle_onnx(subject, LowerQuantizers()) == 3
    assert {one.site: one.kind for one in subject.quantizers} == {
        "0/input": "static",
        "0/weight": "weight",
        "0/output": "static",
    }
    assert {one.site: one.shift for one in subject.quantizers}["0/weight"] == 128


def test_weights_stay_signed_if_asked(translated, settle_onnx):
    subject = make(translated, "in-hindsight-w8a8g8")
    settle_onnx(subject, LowerQuantizers(signed_weights=True))
    (weight,) = [one for one in subject.quantizers if one.kind == "weight"]
    assert (weight.shift, weight.saturates) == (0, True)


def test_a_float_model_stays(translated, settle_onnx):
    subject = make(translated, "identity")
    assert settle_onnx(subject, LowerQuantizers()) == 0
    assert subject.quantizers == []
