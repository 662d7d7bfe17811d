"""Codes are saved in place of floats that backward computes with again."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.halves import finish_halves
from qcompiler.passes.halves.save_codes import SaveCodes
from qcompiler.passes.ir.meta import is_backward, pin_saved
from qcompiler.passes.ir.quantizer import list_dequantizers
from qcompiler.passes.ir.verify import VerifyError
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


class Wide(nn.Module):
    """A linear layer and a function in double numbers: backward starts from the float, which has half the bytes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x):
        wide = self.layer(x).double()
        return wide * torch.tanh(wide)


def outputs(text):
    return Recipe(name="outputs", rules=(Rule(role=Role.OUTPUT, spec=parse_spec(text)),))


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def save_floats(graph):
    """Make the partitioner save what codes were turned back into; by itself it turns them back again in backward."""
    for one in list_dequantizers(graph):
        if not is_backward(one.floats):
            pin_saved(one.floats)


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_saved_before_and_codes_after(bits, in_front_of, settle_halves):
    recipe = outputs(f"int{bits}:fit:tensor:nearest:pass")
    halves = in_front_of(SaveCodes, recipe, Wide(), leaf(), prepare=save_floats)
    with pytest.raises(VerifyError, match="its codes would do"):
        finish_halves(halves)
    count = len(list_dequantizers(halves.backward.graph))
    assert settle_halves(halves, SaveCodes()) == 1
    finish_halves(halves)
    assert len(list_dequantizers(halves.backward.graph)) == count + 1


def test_golden_codes(in_front_of, settle_halves, text, golden):
    recipe = outputs("int4:fit:tensor:nearest:pass")
    halves = in_front_of(SaveCodes, recipe, Wide(), leaf(), prepare=save_floats)
    before = text(halves)
    settle_halves(halves, SaveCodes())
    golden(before=before, after=text(halves))


def test_does_not_fire_where_codes_are_saved(in_front_of, settle_halves, text):
    halves = in_front_of(SaveCodes, "hyperblock-int8", nn.Sequential(nn.Linear(4, 8), nn.ReLU()), leaf())
    before = text(halves)
    assert settle_halves(halves, SaveCodes()) == 0
    assert text(halves) == before


def test_does_not_fire_where_the_partitioner_turns_codes_back_again(in_front_of, settle_halves, text):
    halves = in_front_of(SaveCodes, outputs("int8:fit:tensor:nearest:pass"), Wide(), leaf())
    before = text(halves)
    assert settle_halves(halves, SaveCodes()) == 0
    assert text(halves) == before
    finish_halves(halves)
