"""Copies of a half for first steps."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.relax_views import RelaxViews
from qcompiler.passes.halves.start_ranges import StartRanges


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def test_golden_start(in_front_of, settle_halves, text, golden):
    halves = in_front_of(RelaxViews, "in-hindsight-w8a8g8", nn.Linear(4, 2, bias=False), leaf())
    before = text(halves)
    changes = settle_halves(halves, StartRanges())
    after = text(halves)
    assert changes == sum(old != new for old, new in zip(before.splitlines(), after.splitlines(), strict=True)) > 0
    golden(before=before, after=after)
    assert settle_halves(halves, StartRanges(False)) == changes
    assert text(halves) == before


@pytest.mark.parametrize("recipe", ["hyperblock-int8", "current-w8a8g8"])
def test_does_not_fire_without_states(recipe, in_front_of, settle_halves):
    halves = in_front_of(RelaxViews, recipe, nn.Linear(4, 2), leaf())
    assert settle_halves(halves, StartRanges()) == 0
