"""Ranges that were measured on data become constants."""

import pytest
import torch
from torch import nn

from qcompiler.passes.base import PassError
from qcompiler.passes.frozen.calibrate_ranges import Calibrated, CalibrateRanges
from qcompiler.passes.ir.quantizer import list_quantizers

RANGE = Calibrated(-1.0, 2.0, torch.tensor([[128]], dtype=torch.uint8), None)


@pytest.fixture
def subject(eval_graph):
    return eval_graph("tensor-int8", nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))


def test_golden_calibrate_ranges(subject, apply_frozen, frozen_text, golden):
    apply_frozen(subject)
    before = frozen_text(subject)
    apply_frozen(subject, CalibrateRanges({"0/input": RANGE}))
    golden(before=before, after=frozen_text(subject))


def test_one_site(subject, settle_frozen):
    assert settle_frozen(subject, CalibrateRanges({"0/input": RANGE})) == 1
    found = {quantizer.site: subject.get_value(quantizer.scale) for quantizer in list_quantizers(subject.graph)}
    assert found["0/input"] is RANGE.scale
    assert found["0/weight"] is not RANGE.scale


def test_a_scale_of_another_type_is_refused(subject, apply_frozen):
    wrong = Calibrated(-1.0, 2.0, torch.tensor([[0.25]]), None)
    with pytest.raises(
        PassError, match=r"calibrate-ranges failed .*: scale is torch.float32 \[1, 1\]; valid: torch.uint8"
    ):
        apply_frozen(subject, CalibrateRanges({"0/input": wrong}))


@pytest.mark.parametrize("ranges", [{}, {"1/input": RANGE}])
def test_other_sites_stay(subject, ranges, settle_frozen):
    assert settle_frozen(subject, CalibrateRanges(ranges)) == 0
    assert subject.constants == {}
