"""Codes that one half makes and reads are not packed."""

import torch
from torch import nn

from qcompiler.passes.halves.drop_packing import DropPacking
from qcompiler.passes.halves.partition import Partition
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

WEIGHTS = Recipe(name="w", rules=(Rule(role=Role.WEIGHT, spec=parse_spec("int4:fit:tensor:nearest:pass")),))
INPUTS = Recipe(name="x", rules=(Rule(role=Role.ACTIVATION, spec=parse_spec("int4:fit:tensor:nearest:pass")),))


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def layer():
    return nn.Linear(4, 2, bias=False)


def count(halves, target):
    return sum(len(list(half.graph.find_nodes(op="call_function", target=target))) for half in halves.graphs)


def test_golden_drop_packing(in_front_of, settle_halves, text, golden):
    halves = in_front_of(DropPacking, WEIGHTS, layer(), leaf())
    before = text(halves)
    assert settle_halves(halves, DropPacking()) == 1
    assert count(halves, ops.PACK) == count(halves, ops.UNPACK) == 0
    golden(before=before, after=text(halves))


def test_does_not_fire_on_codes_that_are_saved(in_front_of, settle_halves, text):
    halves = in_front_of(DropPacking, INPUTS, layer(), leaf())
    before = text(halves)
    assert settle_halves(halves, DropPacking()) == 0
    assert text(halves) == before
    assert count(halves, ops.PACK) == count(halves, ops.UNPACK) == 1


def test_does_not_fire_on_a_joint_graph(in_front_of, text):
    halves = in_front_of(Partition, WEIGHTS, layer(), leaf())
    before = text(halves)
    assert DropPacking()(halves) == 0
    assert text(halves) == before


def test_no_bit_changes(changes_no_bit):
    def build():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    assert changes_no_bit(build, WEIGHTS, [leaf()], DropPacking) > 0
    x = torch.tensor([[torch.nan, torch.inf, -0.0, 1.0]] * 3, requires_grad=True)
    assert changes_no_bit(build, WEIGHTS, [x], DropPacking) > 0
    assert changes_no_bit(build, WEIGHTS, [torch.randn(0, 4, requires_grad=True)], DropPacking) > 0
