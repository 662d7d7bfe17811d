"""Weights become codes, known ranges scales."""

import torch
from torch import nn

from qcompiler.passes.frozen.freeze_quantizers import FreezeQuantizers
from qcompiler.passes.ir.quantizer import list_quantizers


class Sum(nn.Module):
    """A linear layer whose weight is W + B·A."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (2, 4), (4, 2)))

    def forward(self, x):
        return nn.functional.linear(x, self.w + self.b @ self.a)


def test_golden_freeze_quantizers(eval_graph, apply_frozen, frozen_text, golden):
    subject = eval_graph("in-hindsight-w8a8g8", nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    apply_frozen(subject)
    before = frozen_text(subject)
    apply_frozen(subject, FreezeQuantizers())
    golden(before=before, after=frozen_text(subject))


def test_codes_and_scale_of_a_weight(eval_graph, settle_frozen):
    model = nn.Sequential(nn.Linear(4, 3))
    subject = eval_graph("tensor-int8", model, torch.randn(2, 4))
    assert settle_frozen(subject, FreezeQuantizers()) == 1  # the input is measured
    found = {quantizer.site: quantizer for quantizer in list_quantizers(subject.graph)}
    codes, exponent = subject.codes["0/weight"], subject.get_value(found["0/weight"].scale).item()
    assert torch.equal(codes, (model[0].weight.detach() / 2.0 ** (exponent - 127)).round().to(torch.int8))
    assert codes.abs().max() >= 64
    assert subject.get_value(found["0/input"].scale) is None  # the range of the present tensor
    assert subject.list_folded() == {}


def test_a_weight_that_others_give(eval_graph, settle_frozen):
    subject = eval_graph("tensor-int8", Sum(), torch.randn(2, 4))
    assert settle_frozen(subject, FreezeQuantizers()) == 3
    left = {quantizer.site for quantizer in list_quantizers(subject.graph)}
    assert len(left) == 2
    assert subject.list_folded().keys() == subject.codes.keys() - left
    assert len(subject.list_folded()) == 2


def test_a_float_graph_stays(eval_graph, settle_frozen):
    subject = eval_graph("identity", nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    assert settle_frozen(subject, FreezeQuantizers()) == 0
    assert subject.constants == {}
