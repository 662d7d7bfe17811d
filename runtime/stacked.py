"""Read and move the ranges of many sites side by side, in a few calls of torch, in place of some for every site.

Ranges in hindsight follow from their states, which stand beside each other here, [3, blocks of all sites]: the
arithmetic is the same for each block. The results are those of `scale`, `zero_point` and `update` in
runtime/references.py, bit for bit.
"""

from collections.abc import Sequence

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
    counts, dims = list(map(_count_blocks, states)), dims or [0] * len(states)
    parts = [numbers.split(counts, -1) for numbers in beside]
    shaped = [
        [part.reshape([1] * dim) if dim and part.ndim == 1 else part for part, dim in zip(row, dims, strict=True)]
        for row in parts
    ]
    return [part.clone() for row in shaped for part in row]


def fake_read_ranges(states: Sequence[Tensor], spec: str, dims: Sequence[int] = ()) -> list[Tensor]:
    """Return empty results: of many sites the arithmetic takes as long as all other shapes of a graph."""
    s, counts = parse_spec(spec), list(map(_count_blocks, states))
    shapes = [[1] * dim if dim else [count] for dim, count in zip(dims or [0] * len(states), counts, strict=True)]
    reach = [[2, count] for count in counts]
    kinds = [(shapes, s.scale.dtype), (reach, torch.float32), *[(shapes, s.format.dtype)] * s.has_zero_point]
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
    parts = keep_finite(after, known).split(list(map(_count_blocks, states)), 1)
    return [part.reshape(state.shape).clone() for part, state in zip(parts, states, strict=True)]


def _take_range(s: QuantSpec) -> Hindsight:
    estimator = find_hindsight(s)
    if estimator is None:
        raise ValueError(f"ranges side by side: got {s}; valid: a range in hindsight, a scale not of two levels")
    return estimator


def _count_blocks(state: Tensor) -> int:
    return state[0].numel()


def _put_beside(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([state.flatten(1) for state in states], 1)
