"""Recipes of In-Hindsight Quantization Range Estimation: 8 bits, ranges of the past or of the present."""

from typing import Final

from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role
from qcompiler.runtime.spec import parse_spec

HINDSIGHT_PAPER: Final = (
    "M. Fournarakis, M. Nagel: In-Hindsight Quantization Range Estimation for Quantized Training, CVPR Workshops 2021, "
    "arXiv 2105.04246"
)


def _make_w8a8g8(name: str, estimator: str, what: str) -> Recipe:
    """8 bits for weights, activations, outputs and gradients, the ranges of all but weights by one estimator."""
    nearest, noisy = (f"affine8:real:tensor:{rounding}:pass:{estimator}" for rounding in ("nearest", "stochastic"))
    rules = by_role(weight="int8:real:tensor:nearest:pass", activation=nearest, gradient=noisy)
    return Recipe(
        name=name,
        source=f"{HINDSIGHT_PAPER}: {what}",
        rules=(*rules, Rule(role=Role.OUTPUT, spec=parse_spec(nearest))),
    )


#: In-Hindsight (2021): every range but the weights' is known before the tensor, so one pass quantizes.
IN_HINDSIGHT_W8A8G8: Final = _make_w8a8g8("in-hindsight-w8a8g8", "hindsight(0.9,0.01)", "in-hindsight min-max")
#: The baseline of In-Hindsight: the present tensor's own range, two passes.
CURRENT_W8A8G8: Final = _make_w8a8g8("current-w8a8g8", "current", "the baseline current min-max")
#: The baseline of In-Hindsight: a moving average that includes the present tensor, two passes.
RUNNING_W8A8G8: Final = _make_w8a8g8("running-w8a8g8", "running(0.9)", "the baseline running min-max")
