"""The shapes that most recipes have: a rule for each role, one spec everywhere, ends in float."""

from qcompiler.passes.rules import Position, Role, Rule, Sign
from qcompiler.runtime.spec import parse_spec


def by_role(
    *, weight: str = "", activation: str = "", unsigned: str = "", gradient: str = "", position: Position | None = None
) -> tuple[Rule, ...]:
    """Return one rule for each spec that is given, as text; `unsigned` is for activations that are never negative."""
    texts = (
        (Role.WEIGHT, None, weight),
        (Role.ACTIVATION, Sign.NONNEGATIVE, unsigned),
        (Role.ACTIVATION, None, activation),
        (Role.GRADIENT, None, gradient),
    )
    return tuple(
        Rule(role=role, sign=sign, position=position, spec=parse_spec(text)) for role, sign, text in texts if text
    )


def quantize_everywhere(spec: str) -> tuple[Rule, ...]:
    """Return one spec, as text, for weights, activations and gradients."""
    return by_role(weight=spec, activation=spec, gradient=spec)


def float_ends(reason: str) -> tuple[Rule, ...]:
    """Return the first and the last contraction stay in float."""
    return tuple(Rule(spec=None, position=end, reason=reason) for end in (Position.FIRST, Position.LAST))
