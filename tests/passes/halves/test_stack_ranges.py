"""Ranges in hindsight of all sites in two calls."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.stack_ranges import StackRanges
from qcompiler.runtime import ops


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def count(halves, *targets):
    return sum(
        len(half.graph.find_nodes(op="call_function", target=target)) for half in halves.graphs for target in targets
    )


def test_golden_stack_ranges(compiled_halves, settle_compiled, text, golden):
    halves = compiled_halves("in-hindsight-w8a8g8", nn.Linear(4, 2, bias=False), leaf())
    before, moved = text(halves), count(halves, ops.UPDATE)
    assert settle_compiled(halves, StackRanges()) > moved > 0
    assert count(halves, ops.UPDATE) == 0
    assert count(halves, ops.MEASURE) == moved
    assert count(halves, ops.READ_RANGES) == count(halves, ops.MOVE_RANGES) == 2  # one a half
    golden(before=before, after=text(halves))


@pytest.mark.parametrize("recipe", ["hyperblock-int8", "current-w8a8g8"])
def test_does_not_fire_on_other_ranges(recipe, compiled_halves, text):
    halves = compiled_halves(recipe, nn.Linear(4, 2), leaf())
    before = text(halves)
    assert StackRanges()(halves) == 0
    assert text(halves) == before


@pytest.mark.parametrize("layers", [1, 3])
def test_no_bit_changes(layers, compiled_halves, run_halves, same_bits):
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(layers)])
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    halves = [compiled_halves("in-hindsight-w8a8g8", model, x) for _ in range(2)]
    assert StackRanges()(halves[1]) > 0
    assert same_bits(*map(run_halves, halves))
