"""Recipes of papers with float formats of 8 bits, and with float formats of 4 bits for gradients."""

from typing import Final

from qcompiler.passes.rules import Position, Product, Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, float_ends, quantize_everywhere
from qcompiler.runtime.spec import parse_spec

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
#: FP8 with delayed scaling: each tensor is scaled by the largest magnitude of the last 16 steps.
FP8_DELAYED: Final = Recipe(
    name="fp8-delayed",
    source="P. Micikevicius et al.: FP8 Formats for Deep Learning, 2022, arXiv 2209.05433, with delayed scaling",
    rules=by_role(
        weight="e4m3:real:tensor:nearest:pass:history(16,0,1)",
        activation="e4m3:real:tensor:nearest:pass:history(16,0,1)",
        gradient="e5m2:real:tensor:nearest:pass:history(16,0,1)",
    ),
)

#: Ultra-low precision: INT4 forward; gradients in radix-4 FP4, on another grid for each of the two contractions.
ULTRA_LOW_FP4: Final = Recipe(
    name="ultra-low-fp4",
    source="X. Sun et al.: Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020 (scales from the "
    "largest gradient, not trained; ends as in PACT)",
    rules=(
        # with 4 bits there a ResNet-8 on CIFAR-10 reached 18 %, and float 54 %
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
#: LUQ: INT4 forward; gradients on a logarithmic grid whose rounding is unbiased, also below the smallest level.
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

#: every recipe of this file
FLOAT_PAPERS: Final[tuple[Recipe, ...]] = (
    FP8_2018,
    HFP8,
    FP8_DELAYED,
    ULTRA_LOW_FP4,
    LUQ,
)
