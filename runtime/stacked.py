"""Read and move the ranges of many sites side by side, in a few calls of torch, in place of some for every site.

Ranges in hindsight follow from their states, which stand beside each other here, [3, blocks of all sites]: the
arithmetic is the same for each block. The results are those of `scale`, `zero_point` and `update` in
runtime/references.py, bit for bit.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qcompiler.runtime import scales
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.ranges.estimator import Observed, find_reach, keep_finite
from qcompiler.runtime.ranges.past import Hindsight
from qcompiler.runtime.spec import QuantSpec, Scale, parse_spec


def find_hindsight(spec: QuantSpec) -> Hindsight | None:
    """Return the estimator if its states can stand side by side: scales of two levels look at all blocks of a site."""
    return spec.range if isinstance(spec.range, Hindsight) and spec.scale is not Scale.TWO_LEVEL else None


def read_ranges(states: Sequence[Tensor], spec: str, dims: Sequence[int] = ()) -> list[Tensor]:
    """Return the scales of every site, then the reach, then the zero points, if the format has them.

    Args:
        states: [3, *blocks along each axis], at least one.
        spec: `str` of a `QuantSpec` with a range in hindsight.
        dims: of each site the dimensions of scale and zero point, if it has one block; else 0, and they are [blocks].

    Returns:
        For each site a scale and a zero point; the reach is float32 [2, blocks]: the smallest and the largest value
        that is not clipped.
    """
    s = parse_spec(spec)
    known = _put_beside(states)
    low, high = _take_range(s).read(known)
    scale = scales.from_ends(low, high, s)
    beside = [scale, torch.stack(find_reach((low, high), s.format.kind, s.format.magnitude_bits))]
    beside += [scales.find_zero_point(low, scale, s)] if s.has_zero_point else []
    shapes, reach = _list_shapes(states, dims)
    return [part for numbers in beside for part in _take_apart(numbers, reach if numbers.ndim > 1 else shapes)]


def fake_read_ranges(states: Sequence[Tensor], spec: str, dims: Sequence[int] = ()) -> list[Tensor]:
    """Return empty results: of many sites the arithmetic takes as long as all other shapes of a graph."""
    s = parse_spec(spec)
    shapes, reach = _list_shapes(states, dims)
    kinds = [(shapes, s.scale.dtype), ([(2, *shape) for shape in reach], torch.float32)]
    kinds += [(shapes, s.format.dtype)] * s.has_zero_point
    return [states[0].new_empty(shape, dtype=dtype) for sizes, dtype in kinds for shape in sizes]


def fake_move_ranges(states: Sequence[Tensor], measured: Sequence[Tensor], spec: str) -> list[Tensor]:
    """Return empty states."""
    return [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]


def measure(x: Tensor, reach: Tensor, spec: str, layout: str) -> Tensor:
    """Return what the next state takes from `x`: float32 [numbers, blocks].

    Args:
        x: a floating tensor, any shape.
        reach: [2, blocks], of the site, from `read_ranges`.
    """
    s = parse_spec(spec)
    seen = Observed(x, view_blocks(tuple(x.shape), layout, s.block), s.format.kind, s.format.magnitude_bits)
    low, high = reach.reshape(2, *seen.view.counts).unbind()
    numbers = _take_range(s).measure(seen, (low, high))
    return torch.stack([number.reshape(-1).expand(reach.shape[1]) for number in numbers])


def move_ranges(states: Sequence[Tensor], measured: Sequence[Tensor], spec: str) -> list[Tensor]:
    """Return the state of every site after the step; unchanged in a block for which it would not be finite.

    Args:
        states: as for `read_ranges`.
        measured: for each state what `measure` returned.
    """
    known = _put_beside(states)
    after = _take_range(parse_spec(spec)).move(known, torch.cat(list(measured), 1).unbind())
    return _take_apart(keep_finite(after, known), [tuple(state.shape[1:]) for state in states])


def _take_range(s: QuantSpec) -> Hindsight:
    estimator = find_hindsight(s)
    if estimator is None:
        raise ValueError(f"ranges side by side: got {s}; valid: a range in hindsight, a scale not of two levels")
    return estimator


#: of the numbers of a site
_Shape: TypeAlias = tuple[int, ...]


def _list_shapes(states: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[_Shape], list[_Shape]]:
    """Return for each site the shapes of scale and zero point, and of a row of the reach (arguments: `read_ranges`)."""
    counts: list[_Shape] = [(state.numel() // len(state),) for state in states]
    return [(1,) * dim or count for count, dim in zip(counts, dims or [0] * len(states), strict=True)], counts


def _take_apart(numbers: Tensor, shapes: Sequence[_Shape]) -> list[Tensor]:
    """Return a copy of the numbers of each site: [*rows, blocks of all sites] → [*rows, *shape].

    Neighbors of one shape are copied by one call: 43 sites take 20 µs in place of 130.
    """
    rows, parts, start = numbers.shape[:-1], list[Tensor](), 0
    for shape, same in itertools.groupby(shapes):
        count = len(list(same))
        length = count * math.prod(shape)
        part = numbers.narrow(-1, start, length).view(*rows, count, *shape)
        parts += torch.ops.aten.unbind_copy.int(part, len(rows))
        start += length
    return parts


def _put_beside(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([state.flatten(1) for state in states], 1)
