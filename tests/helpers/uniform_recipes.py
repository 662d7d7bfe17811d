"""Recipes that quantize every operand alike."""

from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


def uniform(text, **roles):
    """One spec for all operands, or another one for some roles."""
    named = tuple(Rule(role=Role(role), spec=parse_spec(spec)) for role, spec in roles.items())
    return Recipe(name="uniform", rules=(*named, Rule(spec=parse_spec(text))))
