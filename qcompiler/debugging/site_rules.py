"""From a site back to the rules of a recipe that decided about the site, for the layers of the site alone."""

import dataclasses
import glob
from collections.abc import Callable

from qcompiler.debugging.recording import Recording
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import QuantSpec


def site_rules(
    recording: Recording,
    recipe: Recipe,
    site: str,
    change: Callable[[QuantSpec], QuantSpec | None],
    reason: str = "",
) -> tuple[Rule, ...]:
    """Return the rules that made a quantizer, each once: with another spec, and for the layers of the quantizer alone.

    `change` makes the new spec of each rule. In front of all others of the recipe the rules change this site, and other
    sites only if no rule can tell both apart.
    """
    rules = (
        dataclasses.replace(
            rule,
            spec=None if rule.spec is None else change(rule.spec),
            role=role,
            operator=fact.operator,
            module=glob.escape(fact.module),
            position=None,
            sign=None,
            reason=reason,
        )
        for fact, role, rule in _list_deciders(recording, recipe, site)
    )
    return tuple(dict.fromkeys(rules))


def _list_deciders(recording: Recording, recipe: Recipe, site: str) -> list[tuple[Contraction, Role, Rule]]:
    """Return (layer, role, rule) of all readers of the site; for the role output the layer of the result."""
    found = [(product.fact, operand.role, operand.rule) for product, operand in recording.readers(site)]
    if get_role(site) is Role.OUTPUT:
        name = site.partition("#")[0]
        facts = [product.fact for product in recording.products.values()]
        forward = [fact for fact in facts if fact.gradient_of is None and not fact.is_bias]
        found = [(fact, Role.OUTPUT, fact.output_rule) for fact in forward if name == f"{fact.site}/output"]
    return [(fact, role, recipe.rules[index]) for fact, role, index in found if index is not None]
