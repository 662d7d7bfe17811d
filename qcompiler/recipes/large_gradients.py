"""Recipes of Toward INT4 Fixed-Point Training: intervals for large gradients, and the rivals of that paper."""

from typing import Final

from qcompiler.recipes.block_floating import HYPERBLOCK, HYPERBLOCK_PAPER, block_rules, end_rules
from qcompiler.recipes.hindsight import HINDSIGHT_PAPER
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, float_ends

LARGE_GRADIENT_PAPER: Final = (
    "D. Kim, J. Lee, J. Jeon, J. Moon, B. Ham: Toward INT4 Fixed-Point Training via Exploring Quantization Error for "
    "Gradients, ECCV 2024, arXiv 2407.12637"
)


def _large_gradients(name: str, bits: int, estimator: str, what: str = "") -> Recipe:
    """Return the quantizers of the third paper, one range a tensor, with an estimator for gradients."""
    return Recipe(
        name=name,
        source=LARGE_GRADIENT_PAPER + what,
        rules=float_ends("as in the paper's CIFAR settings")
        + by_role(
            weight=f"int{bits}:real:tensor:nearest:clip:learned(3)",
            unsigned=f"uint{bits}:real:tensor:nearest:clip:learned(3)",
            activation=f"int{bits}:real:tensor:nearest:clip:learned(3)",
            gradient=f"int{bits}:real:tensor:stochastic:pass:{estimator}",
        ),
    )


#: Toward INT4 (ECCV 2024): learned ranges forward; the interval of gradients follows the large ones.
INT4_LARGE_GRADIENTS: Final = _large_gradients("int4-large-gradients", 4, "large(0.001,0.001,0)")
#: The same with 5 bits.
INT5_LARGE_GRADIENTS: Final = _large_gradients("int5-large-gradients", 5, "large(0.001,0.001,0)")
#: The same with 8 bits.
INT8_LARGE_GRADIENTS: Final = _large_gradients("int8-large-gradients", 8, "large(0.001,0.001,0)")
#: The same, the largest magnitude taken in hindsight too: one pass.
INT4_LARGE_HINDSIGHT: Final = _large_gradients(
    "int4-large-hindsight", 4, "large(0.001,0.001,0.9)", ", with the maxima of " + HINDSIGHT_PAPER
)
#: The baseline: the whole range of gradients.
INT4_MINMAX: Final = _large_gradients("int4-minmax", 4, "current", ": the baseline min-max")
#: The baseline: the clip of smallest cosine distance (DSGC, CVPR 2020).
INT4_DSGC: Final = _large_gradients("int4-dsgc", 4, "cosine(100,20)", ": the baseline DSGC")
#: Hyperblocks whose gradients are cut by the rule of large gradients, each block at γ times the maximum of the block.
HYPERBLOCK_INT4_LARGE: Final = Recipe(
    name="hyperblock-int4-large",
    source=f"{HYPERBLOCK_PAPER}, with the gradients of {LARGE_GRADIENT_PAPER}",
    rules=end_rules(8, HYPERBLOCK)
    + by_role(gradient="int4:max:b2c8:stochastic:pass:large(0.001,0.001,0)")
    + block_rules(4, HYPERBLOCK)[:2],
)
