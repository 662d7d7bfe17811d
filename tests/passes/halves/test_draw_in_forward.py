"""One key a step: backward that runs twice rounds alike."""

import torch
from torch import nn

from qcompiler.passes.halves.draw_in_forward import DrawInForward
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

#: only gradients round stochastically, so that the partitioner moves the key to backward if nothing pins it
GRADIENTS = Recipe(
    name="gradients", rules=(Rule(role=Role.GRADIENT, spec=parse_spec("int8:fit:tensor:stochastic:pass")),)
)


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def keys(half):
    return list(half.graph.find_nodes(op="call_function", target=ops.DRAW_KEY))


def test_golden_draw(in_front_of, settle_halves, text, golden):
    halves = in_front_of(DrawInForward, GRADIENTS, nn.Linear(4, 2, bias=False), leaf())
    before = text(halves)
    assert settle_halves(halves, DrawInForward()) == 1
    assert (len(keys(halves.forward)), keys(halves.backward)) == (1, [])
    assert halves.saved[-1] is keys(halves.forward)[0]
    golden(before=before, after=text(halves))


def test_does_not_fire_on_a_saved_key(in_front_of, settle_halves):
    """One that forward reads too."""
    rules = (Rule(spec=parse_spec("int8:fit:tensor:stochastic:pass")),)
    halves = in_front_of(DrawInForward, Recipe(name="all", rules=rules), nn.Linear(4, 2), leaf())
    assert len(keys(halves.forward)) == 1
    assert settle_halves(halves, DrawInForward()) == 0
