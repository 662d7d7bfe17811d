"""Comparisons of backward are made in forward, and saved as bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.save_masks import SaveMasks
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.saved_reads import MASKED
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import SAVINGS

FUNCTIONS = {
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.25)),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "where": lambda x: torch.where(x > 0.25, 3 * x, x),
}
COMPARISONS = {"le", "lt", "ge", "gt", "eq", "ne", "logical_or", "logical_and"}
#: function → gradients that are written out, and comparisons that forward makes
FIRES = {"relu": 2, "leaky relu": 2, "prelu": 2}
SAVE8 = Recipe(name="int8", rules=(SAVINGS["int8"],))
MASK8 = SaveMasks(SAVE8.rules)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def layer(function, act):
    return function(lambda m, x: m.out(act(m.fc(x))), fc=nn.Linear(4, 6), out=nn.Linear(6, 2))


def list_masks(halves):
    return [node for node in halves.saved if get_value(node).dtype is torch.bool]


def test_golden_masks(in_front_of, settle_halves, text, golden, function):
    halves = in_front_of(SaveMasks, SAVE8, layer(function, F.leaky_relu), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, MASK8) == 2
    golden(before=before, after=text(halves))


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_bit_changes(name, in_front_of, settle_halves, run_halves, same_bits, function):
    model, x = layer(function, FUNCTIONS[name]), leaf(5, 4)
    halves = [in_front_of(SaveMasks, SAVE8, model, x) for _ in range(2)]
    count = len(halves[0].saved)
    expected = run_halves(halves[0])
    assert settle_halves(halves[1], MASK8) == FIRES.get(name, 0)  # the masks of the others are saved already
    left = [node.target for node in halves[1].backward.graph.nodes if node.op == "call_function"]
    assert not [one for one in left if one in MASKED or str(one).split(".")[1] in COMPARISONS]
    found, outputs = run_halves(halves[1]), halves[0].outputs
    assert same_bits(found[:outputs], expected[:outputs])
    assert same_bits(found[outputs + len(halves[1].saved) :], expected[outputs + count :])


def test_a_comparison_behind_a_norm_that_backward_computes_again(in_front_of, settle_halves):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 2))
    halves = in_front_of(SaveMasks, SAVE8, model, leaf(5, 4))
    assert settle_halves(halves, MASK8) == 1
    (mask,) = list_masks(halves)
    assert str(mask.target) == "aten.logical_or.default"
    assert not any("aten.le" in str(node.target) for node in halves.backward.graph.nodes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["relu", "leaky relu", "relu6", "softshrink", "clamp"])
def test_gradients_in_front_of_a_mask_are_those_of_float(name, bits, function):
    """The gradient of the input reads no code: the mask is exact."""
    torch._dynamo.reset()
    model, x, grad = layer(function, FUNCTIONS[name]), leaf(64, 4), torch.randn(64, 2)
    (expected,) = torch.autograd.grad(model(x), x, grad)
    qmodel = qcompiler.compile(model, "identity", backend="eager", save=f"int{bits}")
    (found,) = torch.autograd.grad(qmodel(x), x, grad)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_does_not_fire_without_a_rule(in_front_of, settle_halves, text, function):
    halves = in_front_of(SaveMasks, "identity", layer(function, F.relu), leaf(3, 4))
    before = text(halves)
    kept = Rule(role=Role.SAVED, spec=None, reason="a test")
    for rules in ((), (kept, *SAVE8.rules)):
        assert settle_halves(halves, SaveMasks(rules)) == 0
    assert text(halves) == before


def test_does_not_fire_without_backward(in_front_of, function):
    halves = in_front_of(SaveMasks, SAVE8, layer(function, F.relu), leaf(3, 4))
    assert MASK8(Halves.of_forward(halves.forward, 1)) == 0
