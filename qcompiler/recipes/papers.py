"""The named recipes of other papers, one constant each. recipes.py puts them behind its own."""

import dataclasses
from typing import Final

from qcompiler.passes.rules import Position, Product, Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, float_ends, quantize_everywhere
from qcompiler.runtime.spec import parse_spec

#: Flexpoint, which recipes.py takes the coarsest baselines from too
FLEXPOINT_PAPER: Final = (
    "U. Köster et al.: Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural Networks, "
    "NIPS 2017"
)

#: Fixed point with stochastic rounding: 16 bits, 12 of them behind the point, |x| < 8.
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
#: Fixed-point back-propagation at its usual widths: powers of two, int8 forward, int16 gradients.
FIXED_POINT_BACKPROP: Final = Recipe(
    name="fixed-point-backprop",
    source="X. Zhang et al.: Fixed-Point Back-Propagation Training, CVPR 2020 (without its adaptive bit widths)",
    rules=by_role(
        weight="int8:fit:tensor:nearest:pass",
        activation="int8:fit:tensor:nearest:pass",
        gradient="int16:fit:tensor:nearest:pass",
    ),
)
#: Unified INT8: gradients clipped if the direction suffers least (DSGC). Its learning-rate rule is not in a recipe.
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

#: said by a rule, so that `strict` takes it as asked
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

#: EWGS: the quantizers of int4-large-gradients forward; their gradients are scaled by the error of rounding. δ is ours.
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
#: DoReFa: activations in [0, 1], gradients by sample. Its tanh of weights is a parametrization (docs/recipes.md).
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
#: WAGEUBN: weights on a fixed grid of 2^−7, errors by shift scales in 16 bits; its integer batch norm is not here.
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

#: FP8 of 2018: 1-5-2 everywhere at scale 1, for use with loss scaling; the last layer stays in float.
FP8_2018: Final = Recipe(
    name="fp8-2018",
    source="N. Wang et al.: Training Deep Neural Networks with 8-bit Floating Point Numbers, NeurIPS 2018 (here "
    "accumulated in float32, not in chunks of float16)",
    rules=(
        Rule(spec=None, position=Position.LAST, reason="float16 in the paper"),
        *quantize_everywhere("e5m2:one:tensor:nearest:pass"),
    ),
)
#: HFP8: 1-4-3 with bias 4 forward, 1-5-2 backward, at scale 1, for use with loss scaling.
HFP8: Final = Recipe(
    name="hfp8",
    source="X. Sun et al.: Hybrid 8-bit Floating Point (HFP8) Training and Inference for DNNs, NeurIPS 2019",
    rules=by_role(
        weight="e4m3b11:one:tensor:nearest:pass",
        activation="e4m3b11:one:tensor:nearest:pass",
        gradient="e5m2:one:tensor:nearest:pass",
    ),
)
#: FP8 with delayed scaling: each tensor is scaled by the largest magnitude of its last 16 steps.
FP8_DELAYED: Final = Recipe(
    name="fp8-delayed",
    source="P. Micikevicius et al.: FP8 Formats for Deep Learning, 2022, arXiv 2209.05433, with delayed scaling",
    rules=by_role(
        weight="e4m3:real:tensor:nearest:pass:history(16,0,1)",
        activation="e4m3:real:tensor:nearest:pass:history(16,0,1)",
        gradient="e5m2:real:tensor:nearest:pass:history(16,0,1)",
    ),
)
#: Ultra-low precision: INT4 forward; gradients in radix-4 FP4, on a grid of their own for each of the two products.
ULTRA_LOW_FP4: Final = Recipe(
    name="ultra-low-fp4",
    source="X. Sun et al.: Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020 (scales from the "
    "largest gradient, not trained; ends as in PACT)",
    rules=(
        # with 4 bits there a ResNet-8 on CIFAR-10 reached 18 % where float reached 54 %
        *float_ends("higher precision in the works that its forward is taken from"),
        Rule(
            role=Role.GRADIENT,
            product=Product.WEIGHT_GRADIENT,
            spec=parse_spec("e3m0r4x2:fit:tensor:nearest:pass"),
        ),
        *by_role(
            weight="int4:real:tensor:nearest:pass:sawb",
            unsigned="uint4:real:tensor:nearest:clip:pact(10)",
            activation="int4:real:tensor:nearest:pass:sawb",
            gradient="e3m0r4:fit:tensor:nearest:pass",
        ),
    ),
)
#: LUQ: INT4 forward; gradients on a logarithmic grid whose rounding is unbiased, also below its smallest level.
LUQ: Final = Recipe(
    name="luq",
    source="B. Chmiel et al.: Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats, "
    "ICLR 2023",
    rules=by_role(
        weight="int4:real:tensor:nearest:pass:sawb",
        activation="int4:real:tensor:nearest:pass:sawb",
        gradient="e3m0:real:tensor:stochastic:pass",
    ),
)

_HBFP_PAPER: Final = "M. Drumond et al.: Training DNNs with Hybrid Block Floating Point, NeurIPS 2018, arXiv 1804.01526"


def _make_hbfp(bits: int, position: Position | None = None) -> tuple[Rule, ...]:
    """Return one exponent a sample for activations and gradients, one for 24 × 24 weights; exponents ⌈log2 max⌉."""
    return by_role(
        weight=f"int{bits}:ceil:o24i24:nearest:pass",
        activation=f"int{bits}:ceil:c*s*:nearest:pass",
        gradient=f"int{bits}:ceil:c*s*:stochastic:pass",
        position=position,
    )


#: HBFP with 8 bits.
HBFP8: Final = Recipe(name="hbfp8", source=_HBFP_PAPER, rules=_make_hbfp(8))
_BOOSTER_PAPER: Final = (
    "S. B. Harma et al.: Accuracy Booster: Performance Boosting using Heterogeneous Mixed Mantissa Block Floating "
    f"Point, 2022, arXiv 2211.10737; blocks of {_HBFP_PAPER}"
)
#: HBFP with 6 bits: the last epoch of Accuracy Booster.
HBFP6: Final = Recipe(name="hbfp6", source=_BOOSTER_PAPER, rules=_make_hbfp(6))
#: HBFP with 4 bits, 6 in the first and the last layer: all epochs of Accuracy Booster but the last (schedule.py).
HBFP4: Final = Recipe(
    name="hbfp4",
    source=_BOOSTER_PAPER,
    rules=_make_hbfp(6, Position.FIRST) + _make_hbfp(6, Position.LAST) + _make_hbfp(4),
)

_MX_PAPER: Final = (
    "B. D. Rouhani et al.: Microscaling Data Formats for Deep Learning, 2023, arXiv 2310.10537 (OCP MX 1.0)"
)


def _make_mx(forward: str, backward: str, position: Position | None = None) -> tuple[Rule, ...]:
    """32 elements along the summed axis share a power of two: six quantizers a layer.

    `backward` is the head of a spec: format, scale rule, and the rounding after the block.
    """
    form, scale, rounding = backward.split(":")
    return by_role(
        weight=f"{forward}:max:i32:nearest:pass",
        activation=f"{forward}:max:c32:nearest:pass",
        gradient=f"{form}:{scale}:c32:{rounding}:pass",
        position=position,
    )


_MXFP8: Final = ("e4m3", "e5m2:max:nearest")
#: MXFP8: E4M3 forward, E5M2 backward.
MXFP8: Final = Recipe(name="mxfp8", source=_MX_PAPER, rules=_make_mx(*_MXFP8))
#: MXFP6: E2M3 forward, E3M2 backward.
MXFP6: Final = Recipe(name="mxfp6", source=_MX_PAPER, rules=_make_mx("e2m3", "e3m2:max:nearest"))
#: MXFP4: E2M1, MXFP8 in the first and the last layer. Gradients round stochastically, at a scale that clips none: `max`
#: clips what lies above 6 of 8, and the gradient of a loss, −0.9 beside many 0.01, is then too small on one side in
#: every step: the common part of all classes grew until a ResNet-8 had 24 % right.
MXFP4: Final = Recipe(
    name="mxfp4",
    source=_MX_PAPER,
    rules=_make_mx(*_MXFP8, Position.FIRST)
    + _make_mx(*_MXFP8, Position.LAST)
    + _make_mx("e2m1", "e2m1:fit:stochastic"),
)
#: MXINT8: 8-bit integers.
MXINT8: Final = Recipe(name="mxint8", source=_MX_PAPER, rules=_make_mx("int8", "int8:max:nearest"))
#: NVFP4: 16 elements with an E4M3 scale under one of the tensor; weights in 16 × 16; the ends in float; the operands of
#: the weight gradient turned by Hadamard matrices of 16.
NVFP4: Final = Recipe(
    name="nvfp4",
    source="NVIDIA: Pretraining Large Language Models with NVFP4, 2025, arXiv 2509.25149",
    rules=float_ends("about 15 % of the layers stay in high precision")
    + tuple(
        dataclasses.replace(rule, product=Product.WEIGHT_GRADIENT, rotate=16)
        for rule in by_role(activation="e2m1:two-level:c16:nearest:pass", gradient="e2m1:two-level:c16:stochastic:pass")
    )
    + by_role(
        weight="e2m1:two-level:o16i16:nearest:pass",
        activation="e2m1:two-level:c16:nearest:pass",
        gradient="e2m1:two-level:c16:stochastic:pass",
    ),
)


def _turned_int4() -> tuple[Rule, ...]:
    """Both operands of all three contractions, each turned along its own summed axis: six quantizers a layer."""
    nearest, noisy = "int4:two-level:{}16:nearest:pass", "int4:two-level:{}16:stochastic:pass"
    operands = (
        (Product.FORWARD, by_role(activation=nearest.format("c"), weight=nearest.format("i"))),
        (Product.INPUT_GRADIENT, by_role(gradient=noisy.format("c"), weight=nearest.format("o"))),
        (Product.WEIGHT_GRADIENT, by_role(gradient=noisy.format("c"), activation=nearest.format("c"))),
    )  # choose-blocks turns the last two: their summed axis is the batch
    return tuple(dataclasses.replace(rule, product=product, rotate=16) for product, rules in operands for rule in rules)


#: INT4 in blocks of 16 with the scales of NVFP4, all operands turned by Hadamard matrices of 16 first.
INT4_HADAMARD: Final = Recipe(
    name="int4-hadamard",
    source="M. Chen et al.: INT v.s. FP: A Comprehensive Study of Fine-Grained Low-bit Quantization Formats, 2025, "
    "arXiv 2510.25602 (NVINT4), turned in all three products as in UFP4, 2026, arXiv 2606.20381",
    rules=float_ends("as in nvfp4") + _turned_int4(),
)

_MINIFLOAT_PAPER: Final = "S. Fox et al.: A Block Minifloat Representation for Training Deep Neural Networks, ICLR 2021"


def _block_minifloat(name: str, forward: str, backward: str) -> Recipe:
    """48 × 48 elements share an exponent, and everything rounds stochastically: three quantizers a layer."""
    return Recipe(
        name=name,
        source=_MINIFLOAT_PAPER,
        rules=by_role(
            weight=f"{forward}:max:o48i48:stochastic:pass",
            activation=f"{forward}:max:b48c48:stochastic:pass",
            gradient=f"{backward}:max:b48c48:stochastic:pass",
        ),
    )


#: Block Minifloat, 8 bits: 1-2-5 forward, 1-4-3 backward.
BLOCK_MINIFLOAT8: Final = _block_minifloat("block-minifloat8", "e2m5", "e4m3b7")
#: Block Minifloat, 6 bits: 1-2-3 forward, 1-3-2 backward.
BLOCK_MINIFLOAT6: Final = _block_minifloat("block-minifloat6", "e2m3", "e3m2")
#: Block Minifloat, 4 bits: 1-2-1 forward, 1-3-0 backward.
BLOCK_MINIFLOAT4: Final = _block_minifloat("block-minifloat4", "e2m1", "e3m0")

#: every recipe of this file
LITERATURE: Final[tuple[Recipe, ...]] = (
    GUPTA_FIXED16,
    FLEXPOINT16,
    DFP16,
    FIXED_POINT_BACKPROP,
    UI8,
    ADAPTIVE_INT8,
    STATQUANT_TENSOR,
    STATQUANT_SAMPLE,
    LSQ_W4A4,
    PACT_W4A4,
    EWGS_W4A4,
    DOREFA_W4A4G8,
    WAGEUBN,
    FP8_2018,
    HFP8,
    FP8_DELAYED,
    ULTRA_LOW_FP4,
    LUQ,
    HBFP8,
    HBFP6,
    HBFP4,
    MXFP8,
    MXFP6,
    MXFP4,
    MXINT8,
    NVFP4,
    INT4_HADAMARD,
    BLOCK_MINIFLOAT8,
    BLOCK_MINIFLOAT6,
    BLOCK_MINIFLOAT4,
)
