"""Estimators step by step against the formulas of range_oracle.py."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from range_objects import INF, LAYOUT, NAN, SHAPE, observe, text_of

from qcompiler.runtime import ops
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.ranges.estimator import Range

BLOCKS = ("tensor", "b*s*g*", "b2c4")  # the last does not divide the shape
STARTS = [("int4", "normal"), ("int4", "zeros"), ("int4", "infinite"), ("uint4", "nan"), ("affine8", "infinite")]


def recording(start: str = "normal", steps: int = 20, seed: int = 0) -> list[np.ndarray]:
    """20 tensors as training brings them: a drifting scale, a spike, zeros, an infinity, a NaN."""
    draw = np.random.default_rng(seed)
    tensors = [draw.standard_normal(SHAPE).astype(np.float32) * np.float32(1.2**t) for t in range(steps)]
    tensors[5] *= np.float32(30)
    tensors[9][:] = 0
    tensors[12][1, 2, 0] = -INF
    tensors[14][4, 5, 2] = NAN
    tensors[16][:, 1] *= np.float32(1e-3)
    if start == "zeros":
        tensors[0][:] = 0
    elif start == "infinite":
        tensors[0][2, 3, 1] = INF
    elif start == "nan":
        tensors[0][0, 0, 0] = NAN
    return tensors


def make_case(range_oracle: ModuleType, oracle: ModuleType, estimator: Range, form: str, block: str) -> Any:
    """The oracle's view of an estimator in front of tensors of SHAPE."""
    edges = oracle.read_spec(f"{form}:real:{block}:nearest:pass").edges
    number, counts = oracle.block_numbers(SHAPE, LAYOUT, edges)
    numbers = tuple(float(text) for text in str(estimator).partition("(")[2].rstrip(")").split(",") if text)
    parsed = parse_format(form)
    return range_oracle.Case(estimator.name, numbers, str(parsed.kind), parsed.bits, number, math.prod(counts))


def follow(estimator: Range, form: str, block: str, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """(low, high, state after) of each tensor, through the operator `update`, as the graph runs it."""
    counts = observe(tensors[0], form, block).view.counts
    state = torch.full(estimator.state_shape(counts), NAN)
    result = []
    for x in tensors:
        seen = observe(x, form, block)
        held = estimator.by_axis(state, counts)
        used = torch.where(torch.isnan(held), estimator.first(seen), held)
        low, high = estimator.ends(seen, used)
        first = bool(torch.isnan(state).any())
        after = ops.UPDATE(x, state, text_of(estimator, form, block), LAYOUT, first)
        assert after.dtype == torch.float32
        assert after.shape == state.shape
        result.append((low, high, after))
        state = after
    return result
