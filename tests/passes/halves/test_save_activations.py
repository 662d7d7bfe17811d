"""Floats for operators without a contraction are saved as codes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.save_activations import SaveActivations
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import SAVINGS
from qcompiler.runtime.spec import parse_spec

SAVE8, SAVE4 = (Recipe(name=save, rules=(SAVINGS[save],)) for save in ("int8", "int4"))
STEP8, STEP4 = SaveActivations(SAVE8.rules), SaveActivations(SAVE4.rules)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def saved_floats(halves):
    values = {node.name: get_value(node) for node in halves.saved if node.op != "placeholder"}
    return [name for name, value in values.items() if value.dtype.is_floating_point]


def normed():
    return nn.Sequential(nn.Linear(4, 64, bias=False), nn.LayerNorm(64))


def test_golden_activations(in_front_of, settle_halves, text, golden):
    halves = in_front_of(SaveActivations, SAVE4, normed(), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, STEP4) == 1
    golden(before=before, after=text(halves))


def test_statistics_stay_in_float(in_front_of, settle_halves):
    model = nn.Sequential(nn.Linear(4, 64, bias=False), nn.BatchNorm1d(64))
    halves = in_front_of(SaveActivations, SAVE8, model, leaf(30, 4))
    settle_halves(halves, STEP8)
    assert {get_value(node).shape for node in halves.saved if node.name in saved_floats(halves)} == {(64,)}


@pytest.mark.parametrize(
    "rules",
    [
        (),
        (Rule(role=Role.SAVED, spec=None, reason="a test"), *SAVE8.rules),
        (Rule(role=Role.SAVED, spec=SAVE8.rules[0].spec, module="1"),),  # layer 0 makes the float
        (Rule(spec=parse_spec("int8:fit:tensor:nearest:pass")),),
    ],
    ids=["no rule", "kept", "another module", "a rule of operands"],
)
def test_does_not_fire(rules, in_front_of, settle_halves, text):
    halves = in_front_of(SaveActivations, "identity", normed(), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, SaveActivations(rules)) == 0
    assert text(halves) == before


def test_does_not_fire_without_backward(in_front_of):
    halves = in_front_of(SaveActivations, SAVE8, normed(), leaf(3, 4))
    assert STEP8(Halves.of_forward(halves.forward, 1)) == 0


def test_codes_of_a_contraction_serve_both(in_front_of, settle_halves):
    rule = Rule(role=Role.ACTIVATION, spec=parse_spec("int8:fit:tensor:nearest:pass"))
    recipe = Recipe(name="both", rules=(rule, *SAVE8.rules))
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 2))  # softmax keeps what the layer quantizes
    halves = in_front_of(SaveActivations, recipe, model, leaf(3, 4))
    before = [one.site for one in list_quantizers(halves.forward.graph)]
    assert settle_halves(halves, STEP8) == 1
    assert [one.site for one in list_quantizers(halves.forward.graph)] == before
    assert not saved_floats(halves)
    codes = [one.codes for one in list_dequantizers(halves.backward.graph)]
    assert len(codes) == 1 + len(set(codes))  # one set of codes, read twice


def test_outputs_read_no_code(in_front_of, settle_halves):
    model = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 4), nn.Softmax(-1))
    halves = in_front_of(SaveActivations, SAVE8, model, leaf(3, 4))
    settle_halves(halves, STEP8)
    assert not list_dequantizers(halves.forward.graph)


def test_a_logarithm_stays_in_float(in_front_of, settle_halves, function):
    model = function(lambda m, x: F.log_softmax(m.fc(x), -1), fc=nn.Linear(4, 64))
    halves = in_front_of(SaveActivations, SAVE8, model, leaf(3, 4))
    assert settle_halves(halves, STEP8) == 0
    assert len(saved_floats(halves)) == 1
