"""Blocks of one known range become one block."""

import pytest
import torch
from torch import nn

from qcompiler.passes.frozen.unite_blocks import UniteBlocks
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


def recipe_of(activation):
    """A recipe with this spec for activations, and channelwise weights."""
    weight = Rule(role=Role.WEIGHT, spec=parse_spec("int8:real:i*:nearest:pass"))
    return Recipe(name="blocks", rules=(weight, Rule(role=Role.ACTIVATION, spec=parse_spec(activation))))


FIXED = recipe_of("int8:real:c*:nearest:pass:fixed(-2,2)")


def make(eval_graph, recipe):
    return eval_graph(recipe, nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))


def test_golden_unite_blocks(eval_graph, apply_frozen, frozen_text, golden):
    subject = make(eval_graph, FIXED)
    apply_frozen(subject)
    before = frozen_text(subject)
    apply_frozen(subject, UniteBlocks())
    golden(before=before, after=frozen_text(subject))


def test_one_block_has_the_range_of_all(eval_graph, settle_frozen):
    subject = make(eval_graph, FIXED)
    (quantizer,) = [one for one in list_quantizers(subject.graph) if one.site == "0/input"]
    before = subject.get_value(quantizer.scale)
    assert before.numel() > 1
    assert settle_frozen(subject, UniteBlocks()) == 1
    assert subject.get_value(quantizer.scale).flatten().tolist() == [before.unique().item()]


@pytest.mark.parametrize(
    "activation",
    [
        "int8:real:c*:nearest:pass",  # of the present tensor
        "int8:real:tensor:nearest:pass:hindsight(0.9,0.01)",  # of the past
    ],
)
def test_other_ranges_stay(eval_graph, activation, settle_frozen):
    subject = make(eval_graph, recipe_of(activation))
    assert settle_frozen(subject, UniteBlocks()) == 0
    assert subject.constants == {}
