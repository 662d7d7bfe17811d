"""Recipes of block floating point, with hyperblocks and without, and the recipe that quantizes nothing."""

from typing import Final

from qcompiler.passes.rules import Position, Role, Rule
from qcompiler.recipes.integer_papers import FLEXPOINT_PAPER
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.numbers.blocks import TENSOR, WHOLE, Block
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, Scale, Vjp

#: gradients are summed over many samples, so the rounding must be right on average, also below half a step
_ROUNDING: Final = {
    Role.WEIGHT: Rounding.NEAREST,
    Role.ACTIVATION: Rounding.NEAREST,
    Role.GRADIENT: Rounding.STOCHASTIC,
}


def block_rules(
    bits: int, block: Block, position: Position | None = None, *, scale: Scale = Scale.MAX
) -> tuple[Rule, ...]:
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


def end_rules(bits: int, block: Block) -> tuple[Rule, ...]:
    """Rules for the first and the last contraction, to stand in front of the general ones."""
    return block_rules(bits, block, Position.FIRST) + block_rules(bits, block, Position.LAST)


HYPERBLOCK_PAPER: Final = (
    "M. Gennari do Nascimento, V. A. Prisacariu, R. Fawcett, M. Langhammer: Hyperblock Floating Point: Generalised "
    "Quantization Scheme for Gradient and Inference Computation, WACV 2023, pp. 6364-6373"
)
_CHANNELWISE_PAPER: Final = f"Channel-wise Block Floating Point, the format extended by {HYPERBLOCK_PAPER}"
_TENSOR_PAPER: Final = f"One exponent a tensor, as in {FLEXPOINT_PAPER} (there with 16 bits)"

#: 2 samples × 8 channels of activations and gradients, 4 × 4 channels of weights share an exponent: each of the three
#: contractions of a layer meets a block edge, so each tensor is quantized once. 16 elements an exponent, as below.
#: The edges are our choice, by the error of gradients (docs/measurements.md).
HYPERBLOCK: Final = Block(batch=2, channel=8, out=4, in_=4)
#: As legal as above, and made for integers: every sum of a layer has runs of 64 products, or of 64 channels, under one
#: scale, which the integer kernels add before they scale (docs/integer.md). The edges are the shortest with which
#: scaling costs less than a third of the products, and cost no more accuracy of gradients than 32. All of space shares
#: a scale: otherwise it would change from tap to tap of a convolution (docs/measurements.md).
WIDE_HYPERBLOCK: Final = Block(batch=64, channel=64, space=WHOLE, out=64, in_=64)
#: 16 channels share an exponent: legal for the forward contraction only, so each tensor is quantized a second time
_CHANNELWISE: Final = Block(channel=16, in_=16)

#: Nothing is quantized: outputs and gradients equal plain PyTorch bit for bit.
IDENTITY: Final = Recipe(name="identity", rules=())

#: HyperBlock Floating Point (WACV 2023), 8 bits everywhere.
HYPERBLOCK_INT8: Final = Recipe(
    name="hyperblock-int8",
    source=HYPERBLOCK_PAPER,
    rules=block_rules(8, HYPERBLOCK),
)
#: HyperBlock Floating Point (WACV 2023), 8 bits everywhere, in blocks that are wide enough for integer kernels.
HYPERBLOCK_INT8_WIDE: Final = Recipe(
    name="hyperblock-int8-wide",
    source=HYPERBLOCK_PAPER,
    rules=block_rules(8, WIDE_HYPERBLOCK),
)
#: HyperBlock Floating Point (WACV 2023), 4 bits; 8 bits in the first and the last layer, which is our choice.
HYPERBLOCK_INT4: Final = Recipe(
    name="hyperblock-int4",
    source=HYPERBLOCK_PAPER,
    rules=end_rules(8, HYPERBLOCK) + block_rules(4, HYPERBLOCK),
)
#: Channel-wise Block Floating Point, the baseline of the HyperBlock paper (WACV 2023), 8 bits everywhere.
CHANNELWISE_INT8: Final = Recipe(
    name="channelwise-int8",
    source=_CHANNELWISE_PAPER,
    rules=block_rules(8, _CHANNELWISE),
)
#: Channel-wise Block Floating Point, the baseline of the HyperBlock paper (WACV 2023), 4 bits; the ends as above.
CHANNELWISE_INT4: Final = Recipe(
    name="channelwise-int4",
    source=_CHANNELWISE_PAPER,
    rules=end_rules(8, _CHANNELWISE) + block_rules(4, _CHANNELWISE),
)
#: One exponent a tensor, as in Flexpoint (NIPS 2017), 8 bits everywhere.
TENSOR_INT8: Final = Recipe(
    name="tensor-int8",
    source=_TENSOR_PAPER,
    rules=block_rules(8, TENSOR),
)
#: One exponent a tensor, as in Flexpoint (NIPS 2017), 4 bits, the ends as above: the coarsest baseline.
TENSOR_INT4: Final = Recipe(
    name="tensor-int4",
    source=_TENSOR_PAPER,
    rules=end_rules(8, TENSOR) + block_rules(4, TENSOR),
)
