"""Codes are saved in place of floats that backward computes with again."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.halves import finish_halves
from qcompiler.passes.halves.save_codes import SaveCodes
from qcompiler.passes.ir.quantizer import list_dequantizers
from qcompiler.passes.ir.verify import VerifyError
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


class Cubic(nn.Module):
    """A linear layer and a function that backward computes again from its argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x):
        y = self.layer(x)
        return 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.044715 * torch.pow(y, 3.0))))


def outputs(text):
    return Recipe(name="outputs", rules=(Rule(role=Role.OUTPUT, spec=parse_spec(text)),))


def leaf():
    return torch.randn(3, 4, requires_grad=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_saved_before_and_codes_after(bits, in_front_of, settle_halves):
    halves = in_front_of(SaveCodes, outputs(f"int{bits}:fit:tensor:nearest:pass"), Cubic(), leaf())
    with pytest.raises(VerifyError, match="its codes would do"):
        finish_halves(halves)
    count = len(list_dequantizers(halves.backward.graph))
    assert settle_halves(halves, SaveCodes()) == 1
    finish_halves(halves)
    assert len(list_dequantizers(halves.backward.graph)) == count + 1


def test_golden_codes(in_front_of, settle_halves, text, golden):
    halves = in_front_of(SaveCodes, outputs("int4:fit:tensor:nearest:pass"), Cubic(), leaf())
    before = text(halves)
    settle_halves(halves, SaveCodes())
    golden(before=before, after=text(halves))


def test_does_not_fire_where_codes_are_saved(in_front_of, settle_halves, text):
    halves = in_front_of(SaveCodes, "hyperblock-int8", nn.Sequential(nn.Linear(4, 8), nn.ReLU()), leaf())
    before = text(halves)
    assert settle_halves(halves, SaveCodes()) == 0
    assert text(halves) == before
