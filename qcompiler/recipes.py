"""The named recipes. Bit widths and blocks are tuned here, and nowhere else."""

from typing import Final

from qcompiler.passes.rules import Position, Role, Rule, did_you_mean
from qcompiler.recipe import Recipe, RecipeError
from qcompiler.runtime.blocks import TENSOR, Block
from qcompiler.runtime.formats import IntFormat
from qcompiler.runtime.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, Scale, Vjp

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
_TENSOR_PAPER: Final = (
    "One exponent a tensor, as in U. Köster et al.: Flexpoint: An Adaptive Numerical Format for Efficient Training of "
    "Deep Neural Networks, NIPS 2017 (there with 16 bits)"
)

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

#: every named recipe, under its name
RECIPES: Final[dict[str, Recipe]] = {
    "identity": IDENTITY,
    "hyperblock-int8": HYPERBLOCK_INT8,
    "hyperblock-int4": HYPERBLOCK_INT4,
    "channelwise-int8": CHANNELWISE_INT8,
    "channelwise-int4": CHANNELWISE_INT4,
    "tensor-int8": TENSOR_INT8,
    "tensor-int4": TENSOR_INT4,
}


def get(recipe: str | Recipe) -> Recipe:
    """A recipe from its name, from the path of a file that ends in .yaml or .yml, or from itself.

    Raises:
        RecipeError: no such name, or the file holds no valid recipe.
        OSError: the file cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise RecipeError(f"recipe: got {recipe!r} ({type(recipe).__name__}); valid: a name, a path, or a Recipe")
    if recipe.endswith((".yaml", ".yml")):
        return Recipe.from_file(recipe)
    if recipe not in RECIPES:
        raise RecipeError(
            f"recipe: got {recipe!r}; valid: {', '.join(RECIPES)}, or the path of a .yaml file"
            f"{did_you_mean(recipe, RECIPES)}"
        )
    return RECIPES[recipe]
