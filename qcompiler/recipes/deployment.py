"""Recipes for integer inference: engines can compute from codes to codes."""

from typing import Final

from qcompiler.passes.rules import ADDITION, Behind, Position, Role, Rule, Sign
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

_HINDSIGHT: Final = "hindsight(0.9,0.01)"
_UNSIGNED: Final = parse_spec(f"uint8:real:tensor:nearest:pass:{_HINDSIGHT}")
_AFFINE: Final = parse_spec(f"affine8:real:tensor:nearest:pass:{_HINDSIGHT}")


def _make_output_rules(operator: str) -> tuple[Rule, ...]:
    """Return rules by which every layer of one kind ends in codes: unsigned behind relu, else with a zero point."""
    return tuple(
        Rule(role=Role.OUTPUT, operator=operator, behind=Behind.LAYER, sign=sign, spec=spec)
        for sign, spec in ((Sign.NONNEGATIVE, _UNSIGNED), (None, _AFFINE))
    )


#: 8-bit integers from layer to layer, as inference engines fuse them: weights by output channel, everything that a
#: layer or a residual sum hands on by one range of the past, gradients as in In-Hindsight; the last result is float. In
#: evaluation mode biases are the same as in such an engine. Weights have 7 bits: then x86 CPUs without VNNI sum
#: products exactly in the fastest way (exporting/weights.py).
DEPLOY_INT8: Final = Recipe(
    name="deploy-int8",
    source="B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference, CVPR 2018, with the ranges and gradients of M. Fournarakis, M. Nagel: In-Hindsight Quantization Range "
    "Estimation for Quantized Training, CVPR Workshops 2021, arXiv 2105.04246",
    integer_biases=True,
    rules=(
        Rule(role=Role.WEIGHT, spec=parse_spec("int7:real:i*s*:nearest:pass")),
        Rule(role=Role.ACTIVATION, sign=Sign.NONNEGATIVE, spec=_UNSIGNED),
        Rule(role=Role.ACTIVATION, spec=_AFFINE),
        Rule(role=Role.GRADIENT, spec=parse_spec(f"affine8:real:tensor:stochastic:pass:{_HINDSIGHT}")),
        Rule(spec=None, role=Role.OUTPUT, position=Position.LAST, reason="the result of the model"),
        *_make_output_rules("convolution"),
        *_make_output_rules("linear"),
        *_make_output_rules(ADDITION),
    ),
)
