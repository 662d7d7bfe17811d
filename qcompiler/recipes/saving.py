"""Rules for the floats that operators without a contraction keep for their gradients: `compile(…, save="int8")`."""

import dataclasses
from typing import Final

from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

#: `save` → the rule; blocks are runs in memory, and rounding is right on average, as gradients are sums
SAVINGS: Final = {
    "int8": Rule(role=Role.SAVED, spec=parse_spec("int8:fit:c64:stochastic:pass")),
    "int4": Rule(role=Role.SAVED, spec=parse_spec("int4:fit:c32:stochastic:pass")),
}


def add_saving(recipe: Recipe, save: str | None) -> Recipe:
    """Return the recipe with the rule of `save` behind its own; its own rules of the role *saved* come first."""
    return recipe if save is None else dataclasses.replace(recipe, rules=(*recipe.rules, SAVINGS[save]))
