"""Recipes of papers in which the elements of small blocks share a scale."""

import dataclasses
from typing import Final

from qcompiler.passes.rules import Position, Product, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.rule_sets import by_role, float_ends

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
#: clips numbers above 6 of 8, and the gradient of a loss, −0.9 beside many 0.01, is then too small on one side in every
#: step: the common part of all classes grew until a ResNet-8 had 24 % right.
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
    """Both operands of all three contractions, each turned along the summed axis: six quantizers a layer."""
    nearest, noisy = "int4:two-level:{}16:nearest:pass", "int4:two-level:{}16:stochastic:pass"
    operands = (
        (Product.FORWARD, by_role(activation=nearest.format("c"), weight=nearest.format("i"))),
        (Product.INPUT_GRADIENT, by_role(gradient=noisy.format("c"), weight=nearest.format("o"))),
        (Product.WEIGHT_GRADIENT, by_role(gradient=noisy.format("c"), activation=nearest.format("c"))),
    )  # choose-blocks turns the last two: there the summed axis is the batch
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
BLOCK_PAPERS: Final[tuple[Recipe, ...]] = (
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
