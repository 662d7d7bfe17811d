"""Recipes of papers that train with 8 or 16 bits, mostly with one range a tensor."""

from typing import Final

from qcompiler.passes.rules import Product, Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, quantize_everywhere
from qcompiler.runtime.spec import parse_spec

#: Flexpoint, also the source of the coarsest baselines in block_floating.py
FLEXPOINT_PAPER: Final = (
    "U. Köster et al.: Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural Networks, "
    "NIPS 2017"
)

#: Fixed point with stochastic rounding: 16 bits, 12 bits behind the point, |x| < 8.
GUPTA_FIXED16: Final = Recipe(
    name="gupta-fixed16",
    source="S. Gupta et al.: Deep Learning with Limited Numerical Precision, ICML 2015, arXiv 1502.02551",
    rules=quantize_everywhere("int16:max:tensor:stochastic:pass:fixed(-4,4)"),
)
#: Flexpoint: 16 bits, one exponent a tensor, predicted from the maxima of the last 16 steps.
FLEXPOINT16: Final = Recipe(
    name="flexpoint16",
    source=FLEXPOINT_PAPER,
    rules=quantize_everywhere("int16:ceil:tensor:nearest:pass:history(16,3,2)"),
)
#: Dynamic fixed point: 16 bits, one exponent a tensor, from the present tensor.
DFP16: Final = Recipe(
    name="dfp16",
    source="D. Das et al.: Mixed Precision Training of Convolutional Neural Networks using Integer Operations, "
    "ICLR 2018",
    rules=quantize_everywhere("int16:max:tensor:nearest:pass"),
)
#: Fixed-point back-propagation at the usual widths: powers of two, int8 forward, int16 gradients.
FIXED_POINT_BACKPROP: Final = Recipe(
    name="fixed-point-backprop",
    source="X. Zhang et al.: Fixed-Point Back-Propagation Training, CVPR 2020 (without its adaptive bit widths)",
    rules=by_role(
        weight="int8:fit:tensor:nearest:pass",
        activation="int8:fit:tensor:nearest:pass",
        gradient="int16:fit:tensor:nearest:pass",
    ),
)
#: Unified INT8: gradients clipped if the direction suffers least (DSGC). The learning-rate rule is not in a recipe.
UI8: Final = Recipe(
    name="ui8",
    source="F. Zhu et al.: Towards Unified INT8 Training for Convolutional Neural Network, CVPR 2020",
    rules=by_role(
        weight="int8:real:tensor:nearest:pass",
        activation="int8:real:tensor:nearest:pass",
        gradient="int8:real:tensor:stochastic:pass:cosine(100,20)",
    ),
)
#: Distribution-adaptive INT8: gradients by channel for the weight gradient; channels are summed by the input gradient,
#: which therefore has one range a tensor.
ADAPTIVE_INT8: Final = Recipe(
    name="adaptive-int8",
    source="K. Zhao et al.: Distribution Adaptive INT8 Quantization for Training CNNs, AAAI 2021",
    rules=(
        Rule(
            role=Role.GRADIENT,
            product=Product.WEIGHT_GRADIENT,
            spec=parse_spec("int8:real:b*s*g*:stochastic:pass:adaptive(0.8,0.3)"),
        ),
        *by_role(
            weight="int8:real:tensor:nearest:pass",
            activation="int8:real:tensor:nearest:pass",
            gradient="int8:real:tensor:stochastic:pass:adaptive(0.8,0.3)",
        ),
    ),
)


def _make_statquant(name: str, block: str, what: str) -> Recipe:
    """8 bits; the gradient quantized apart for the weight gradient (one range) and for the input gradient (`block`)."""
    weight_gradient = parse_spec("affine8:real:tensor:stochastic:pass")
    return Recipe(
        name=name,
        source=f"J. Chen et al.: A Statistical Framework for Low-bitwidth Training of DNNs, NeurIPS 2020: {what}",
        rules=(
            Rule(role=Role.GRADIENT, product=Product.WEIGHT_GRADIENT, spec=weight_gradient),
            *by_role(
                weight="affine8:real:tensor:nearest:pass",
                activation="affine8:real:tensor:nearest:pass",
                gradient=f"affine8:real:{block}:stochastic:pass",
            ),
        ),
    )


#: StatQuant with one range a tensor for gradients.
STATQUANT_TENSOR: Final = _make_statquant("statquant-tensor", "tensor", "per-tensor quantizer (PTQ)")
#: StatQuant with one range a sample for the gradients that the input gradient reads.
STATQUANT_SAMPLE: Final = _make_statquant("statquant-sample", "c*s*", "per-sample quantizer (PSQ)")

#: WAGEUBN: weights on a fixed grid of 2^−7, errors by shift scales in 16 bits; the integer batch norm is not here.
WAGEUBN: Final = Recipe(
    name="wageubn",
    source="Y. Yang et al.: Training High-Performance and Large-Scale Deep Neural Networks with Full 8-bit Integers, "
    "2019, arXiv 1909.02384",
    rules=by_role(
        weight="int8:max:tensor:nearest:pass:fixed(-0.5,0.5)",
        activation="int8:round:tensor:nearest:pass",
        gradient="int16:round:tensor:nearest:pass",
    ),
)

#: every recipe of this file
INTEGER_PAPERS: Final[tuple[Recipe, ...]] = (
    GUPTA_FIXED16,
    FLEXPOINT16,
    DFP16,
    FIXED_POINT_BACKPROP,
    UI8,
    ADAPTIVE_INT8,
    STATQUANT_TENSOR,
    STATQUANT_SAMPLE,
    WAGEUBN,
)
