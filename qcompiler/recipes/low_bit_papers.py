"""Recipes of papers with 4 bits forward: ranges are learned or fixed, and most gradients stay in float."""

from typing import Final

from qcompiler.passes.rules import Position, Product, Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, float_ends
from qcompiler.runtime.spec import parse_spec

#: said by a rule, so that `strict` takes float as asked for
_FLOAT_GRADIENTS: Final = (Rule(spec=None, role=Role.GRADIENT, reason="float in the paper"),)

#: LSQ: learned steps for weights and activations, 8 bits at the ends; gradients in float.
LSQ_W4A4: Final = Recipe(
    name="lsq-w4a4",
    source="S. K. Esser et al.: Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153",
    rules=tuple(
        rule
        for bits, position in ((8, Position.FIRST), (8, Position.LAST), (4, None))
        for rule in by_role(
            weight=f"int{bits}:real:tensor:nearest:clip:lsq",
            unsigned=f"uint{bits}:real:tensor:nearest:clip:lsq",
            activation=f"int{bits}:real:tensor:nearest:clip:lsq",
            position=position,
        )
    )
    + _FLOAT_GRADIENTS,
)

#: PACT with SAWB weights: the clip of relu is learned; first and last layer and gradients in float.
PACT_W4A4: Final = Recipe(
    name="pact-w4a4",
    source="J. Choi et al.: PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018, arXiv "
    "1805.06085, with the weights of Accurate and Efficient 2-bit Quantized Neural Networks, SysML 2019",
    rules=float_ends("as in the paper")
    + by_role(weight="int4:real:tensor:nearest:pass:sawb", unsigned="uint4:real:tensor:nearest:clip:pact(10)")
    + (Rule(spec=None, role=Role.ACTIVATION, reason="the paper clips relu"), *_FLOAT_GRADIENTS),
)

#: EWGS: the quantizers of int4-large-gradients forward; the gradients are scaled by the error of rounding. δ is ours.
EWGS_W4A4: Final = Recipe(
    name="ewgs-w4a4",
    source="J. Lee, D. Kim, B. Ham: Network Quantization with Element-wise Gradient Scaling, CVPR 2021, "
    "arXiv 2104.00903",
    rules=float_ends("as in the paper")
    + by_role(
        weight="int4:real:tensor:nearest:ewgs(1):learned(3)",
        unsigned="uint4:real:tensor:nearest:ewgs(1):learned(3)",
        activation="int4:real:tensor:nearest:ewgs(1):learned(3)",
    )
    + _FLOAT_GRADIENTS,
)

#: DoReFa: activations in [0, 1], gradients by sample. The tanh of weights is a parametrization (docs/recipes.md).
DOREFA_W4A4G8: Final = Recipe(
    name="dorefa-w4a4g8",
    source="S. Zhou et al.: DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth "
    "Gradients, 2016, arXiv 1606.06160",
    rules=(
        *float_ends("as in the paper"),
        Rule(
            role=Role.GRADIENT,
            product=Product.WEIGHT_GRADIENT,
            spec=parse_spec("int8:real:tensor:stochastic:pass"),
        ),
        *by_role(
            weight="int4:real:tensor:nearest:pass",
            unsigned="uint4:real:tensor:nearest:clip:fixed(0,1)",
            gradient="int8:real:c*s*:stochastic:pass",
        ),
        Rule(spec=None, role=Role.ACTIVATION, reason="the paper clips to 0 … 1"),
    ),
)

#: every recipe of this file
LOW_BIT_PAPERS: Final[tuple[Recipe, ...]] = (
    LSQ_W4A4,
    PACT_W4A4,
    EWGS_W4A4,
    DOREFA_W4A4G8,
)
