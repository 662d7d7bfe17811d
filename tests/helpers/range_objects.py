"""Tensors as estimators see them, and specs of estimators."""

import torch

from qcompiler.runtime.numbers.blocks import parse_block, view_blocks
from qcompiler.runtime.numbers.formats import IntFormat, parse_format
from qcompiler.runtime.ranges.estimator import Observed, Range
from qcompiler.runtime.spec import QuantSpec, Scale

INF, NAN = float("inf"), float("nan")


SHAPE, LAYOUT = (5, 6, 3), "bcs"


FORMATS = ("int4", "uint4", "affine8")


def observe(x: torch.Tensor, form: str, block: str, layout: str = LAYOUT) -> Observed:
    kind: IntFormat = parse_format(form)
    return Observed(x, view_blocks(tuple(x.shape), layout, parse_block(block)), kind.kind, kind.magnitude_bits)


def text_of(estimator: Range, form: str, block: str) -> str:
    return str(QuantSpec(format=parse_format(form), scale=Scale.REAL, block=parse_block(block), range=estimator))
