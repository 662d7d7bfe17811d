"""`save=` of compile, as rules."""

import pytest

from qcompiler import recipes
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import SAVINGS, add_saving
from qcompiler.runtime.numbers.rounding import Rounding


@pytest.mark.parametrize("save", SAVINGS)
def test_a_word_is_one_rule_behind_all_others(save):
    recipe = recipes.get("hyperblock-int8")
    longer = add_saving(recipe, save)
    assert longer.rules == (*recipe.rules, SAVINGS[save])
    assert longer.name == recipe.name
    assert longer.saves
    assert not recipe.saves


@pytest.mark.parametrize("save", SAVINGS)
def test_the_rule_says_the_bits_and_rounds_right_on_average(save):
    rule = SAVINGS[save]
    assert rule.role is Role.SAVED
    assert f"int{rule.spec.format.bits}" == save
    assert rule.spec.rounding is Rounding.STOCHASTIC
    assert Recipe.from_yaml(Recipe(name="r", rules=(rule,)).to_yaml()).rules == (rule,)


def test_none_adds_nothing():
    recipe = recipes.get("hyperblock-int8")
    assert add_saving(recipe, None) is recipe


def test_a_rule_that_keeps_is_a_rule_too():
    assert Recipe(name="k", rules=(Rule(role=Role.SAVED, spec=None),)).saves
