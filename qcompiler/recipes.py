"""The named recipes: block floating point and the two papers on ranges. Those of other papers: literature.py."""

import os
from typing import Final

from qcompiler import deployment_recipes
from qcompiler.literature import FLEXPOINT_PAPER, LITERATURE
from qcompiler.passes.rules import Position, Role, Rule, did_you_mean
from qcompiler.recipe import Recipe, RecipeError
from qcompiler.rule_sets import by_role, float_ends
from qcompiler.runtime.blocks import TENSOR, Block
from qcompiler.runtime.formats import IntFormat
from qcompiler.runtime.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, Scale, Vjp, parse_spec

#: gradients are summed over many samples, so their rounding must be right on average, also below half a step
_ROUNDING: Final = {
    Role.WEIGHT: Rounding.NEAREST,
    Role.ACTIVATION: Rounding.NEAREST,
    Role.GRADIENT: Rounding.STOCHASTIC,
}


def _rules(bits: int, block: Block, position: Position | None = None, *, scale: Scale = Scale.MAX) -> tuple[Rule, ...]:
    """One rule a role: signed integers of `bits`, and the exponent rule with the smaller error of gradients, `max`."""
    form = IntFormat(bits)
    return tuple(
        Rule(
            role=role,
            position=position,
            spec=QuantSpec(format=form, scale=scale, block=block, rounding=rounding, vjp=Vjp.PASS),
        )
        for role, rounding in _ROUNDING.items()
    )


def _ends(bits: int, block: Block) -> tuple[Rule, ...]:
    """Rules for the first and the last contraction, to stand in front of the general ones."""
    return _rules(bits, block, Position.FIRST) + _rules(bits, block, Position.LAST)


_HYPERBLOCK_PAPER: Final = (
    "M. Gennari do Nascimento, V. A. Prisacariu, R. Fawcett, M. Langhammer: Hyperblock Floating Point: Generalised "
    "Quantization Scheme for Gradient and Inference Computation, WACV 2023, pp. 6364-6373"
)
_CHANNELWISE_PAPER: Final = f"Channel-wise Block Floating Point, the format extended by {_HYPERBLOCK_PAPER}"
_TENSOR_PAPER: Final = f"One exponent a tensor, as in {FLEXPOINT_PAPER} (there with 16 bits)"

#: 2 samples × 8 channels of activations and gradients, 4 × 4 channels of weights share an exponent: each of the three
#: contractions of a layer meets a block edge, so each tensor is quantized once. 16 elements an exponent, as below.
#: The edges are our choice, by the error of gradients (docs/measurements.md).
_HYPERBLOCK: Final = Block(batch=2, channel=8, out=4, in_=4)
#: 16 channels share an exponent: legal for the forward contraction only, so each tensor is quantized a second time
_CHANNELWISE: Final = Block(channel=16, in_=16)

#: Nothing is quantized: outputs and gradients are bitwise those of plain PyTorch.
IDENTITY: Final = Recipe(name="identity", rules=())

#: HyperBlock Floating Point (WACV 2023), 8 bits everywhere.
HYPERBLOCK_INT8: Final = Recipe(
    name="hyperblock-int8",
    source=_HYPERBLOCK_PAPER,
    rules=_rules(8, _HYPERBLOCK),
)
#: HyperBlock Floating Point (WACV 2023), 4 bits; 8 bits in the first and the last layer, which is our choice.
HYPERBLOCK_INT4: Final = Recipe(
    name="hyperblock-int4",
    source=_HYPERBLOCK_PAPER,
    rules=_ends(8, _HYPERBLOCK) + _rules(4, _HYPERBLOCK),
)
#: Channel-wise Block Floating Point, the baseline of the HyperBlock paper (WACV 2023), 8 bits everywhere.
CHANNELWISE_INT8: Final = Recipe(
    name="channelwise-int8",
    source=_CHANNELWISE_PAPER,
    rules=_rules(8, _CHANNELWISE),
)
#: Channel-wise Block Floating Point, the baseline of the HyperBlock paper (WACV 2023), 4 bits; the ends as above.
CHANNELWISE_INT4: Final = Recipe(
    name="channelwise-int4",
    source=_CHANNELWISE_PAPER,
    rules=_ends(8, _CHANNELWISE) + _rules(4, _CHANNELWISE),
)
#: One exponent a tensor, as in Flexpoint (NIPS 2017), 8 bits everywhere.
TENSOR_INT8: Final = Recipe(
    name="tensor-int8",
    source=_TENSOR_PAPER,
    rules=_rules(8, TENSOR),
)
#: One exponent a tensor, as in Flexpoint (NIPS 2017), 4 bits, the ends as above: the coarsest baseline.
TENSOR_INT4: Final = Recipe(
    name="tensor-int4",
    source=_TENSOR_PAPER,
    rules=_ends(8, TENSOR) + _rules(4, TENSOR),
)


_HINDSIGHT_PAPER: Final = (
    "M. Fournarakis, M. Nagel: In-Hindsight Quantization Range Estimation for Quantized Training, CVPR Workshops 2021, "
    "arXiv 2105.04246"
)


def _w8a8g8(name: str, estimator: str, what: str) -> Recipe:
    """8 bits for weights, activations, outputs and gradients, the ranges of all but weights by one estimator."""
    nearest, noisy = (f"affine8:real:tensor:{rounding}:pass:{estimator}" for rounding in ("nearest", "stochastic"))
    rules = by_role(weight="int8:real:tensor:nearest:pass", activation=nearest, gradient=noisy)
    return Recipe(
        name=name,
        source=f"{_HINDSIGHT_PAPER}: {what}",
        rules=(*rules, Rule(role=Role.OUTPUT, spec=parse_spec(nearest))),
    )


#: In-Hindsight (2021): every range but that of weights is known before its tensor is, so one pass quantizes it.
IN_HINDSIGHT_W8A8G8: Final = _w8a8g8("in-hindsight-w8a8g8", "hindsight(0.9,0.01)", "in-hindsight min-max")
#: What In-Hindsight is compared with: the present tensor's own range, two passes.
CURRENT_W8A8G8: Final = _w8a8g8("current-w8a8g8", "current", "the baseline current min-max")
#: What In-Hindsight is compared with: a moving average that includes the present tensor, two passes.
RUNNING_W8A8G8: Final = _w8a8g8("running-w8a8g8", "running(0.9)", "the baseline running min-max")

DEPLOY_INT8: Final = deployment_recipes.DEPLOY_INT8

_LARGE_GRADIENT_PAPER: Final = (
    "D. Kim, J. Lee, J. Jeon, J. Moon, B. Ham: Toward INT4 Fixed-Point Training via Exploring Quantization Error for "
    "Gradients, ECCV 2024, arXiv 2407.12637"
)


def _large_gradients(name: str, bits: int, estimator: str, what: str = "") -> Recipe:
    """The quantizers of the third paper, one range a tensor, with an estimator for gradients."""
    return Recipe(
        name=name,
        source=_LARGE_GRADIENT_PAPER + what,
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
    "int4-large-hindsight", 4, "large(0.001,0.001,0.9)", ", with the maxima of " + _HINDSIGHT_PAPER
)
#: What it is compared with: the whole range of gradients.
INT4_MINMAX: Final = _large_gradients("int4-minmax", 4, "current", ": the baseline min-max")
#: What it is compared with: the clip of smallest cosine distance (DSGC, CVPR 2020).
INT4_DSGC: Final = _large_gradients("int4-dsgc", 4, "cosine(100,20)", ": the baseline DSGC")
#: Hyperblocks whose gradients are cut by the rule of large gradients, each block at γ times its own maximum.
HYPERBLOCK_INT4_LARGE: Final = Recipe(
    name="hyperblock-int4-large",
    source=f"{_HYPERBLOCK_PAPER}, with the gradients of {_LARGE_GRADIENT_PAPER}",
    rules=_ends(8, _HYPERBLOCK)
    + by_role(gradient="int4:max:b2c8:stochastic:pass:large(0.001,0.001,0)")
    + _rules(4, _HYPERBLOCK)[:2],
)

#: every named recipe, under its name
RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        IDENTITY,
        HYPERBLOCK_INT8,
        HYPERBLOCK_INT4,
        CHANNELWISE_INT8,
        CHANNELWISE_INT4,
        TENSOR_INT8,
        TENSOR_INT4,
        IN_HINDSIGHT_W8A8G8,
        CURRENT_W8A8G8,
        RUNNING_W8A8G8,
        DEPLOY_INT8,
        INT4_LARGE_GRADIENTS,
        INT5_LARGE_GRADIENTS,
        INT8_LARGE_GRADIENTS,
        INT4_LARGE_HINDSIGHT,
        INT4_MINMAX,
        INT4_DSGC,
        HYPERBLOCK_INT4_LARGE,
        *LITERATURE,
    )
}


def get(recipe: str | os.PathLike[str] | Recipe) -> Recipe:
    """A recipe from its name, from the path of a file that ends in .yaml or .yml, or from itself.

    Raises:
        RecipeError: no such name, or the file holds no valid recipe.
        OSError: the file cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, os.PathLike):
        return Recipe.from_file(recipe)
    if not isinstance(recipe, str):
        raise RecipeError(f"recipe: got {recipe!r} ({type(recipe).__name__}); valid: a name, a path, or a Recipe")
    if recipe.endswith((".yaml", ".yml")):
        return Recipe.from_file(recipe)
    if recipe not in RECIPES:
        raise RecipeError(
            f"recipe: got {recipe!r}; valid: a name that `qcompiler recipes` lists, or the path of a .yaml file"
            f"{did_you_mean(recipe, RECIPES)}"
        )
    return RECIPES[recipe]
