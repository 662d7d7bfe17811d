"""The axes of a dense tensor in the order of memory, the outermost first, as the kernels walk through the blocks."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from qcompiler.runtime.numbers.blocks import BlockView, group_dims


@dataclasses.dataclass(frozen=True)
class Axis:
    """A run of neighboring elements, or of runs of the axes behind this one."""

    #: elements
    extent: int
    #: elements that share a scale
    edge: int
    #: from one scale to the next, in the tensor of scales
    scale: int
    #: from one element to the next, in the row-major index
    logical: int


def order_scales(view: BlockView, layout: str, stride: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of scales that follow each other as the blocks do in memory."""
    outermost = [max((stride[d] for d in dims if view.shape[d] > 1), default=0) for dims in group_dims(layout)]
    strides, step = [0] * len(outermost), 1
    for axis in sorted(range(len(outermost)), key=lambda axis: (outermost[axis], -axis)):
        strides[axis] = step
        step *= max(1, view.counts[axis])
    return tuple(strides)


def list_axes(
    view: BlockView, layout: str, stride: Sequence[int], scale_stride: Sequence[int], *, whole_blocks: bool
) -> tuple[Axis, ...] | None:
    """Return the axes of a dense tensor; None if the dimensions of one axis of blocks are apart in memory.

    Args:
        view: the shape, and the blocks.
        layout: a letter for each dimension.
        stride: of the tensor.
        scale_stride: of the tensor of scales.
        whole_blocks: keep the elements of a block together; False: only the scale of each element counts.
    """
    if 0 in view.shape:
        return (Axis(0, 1, 0, 0),)
    logical = [math.prod(view.shape[d + 1 :]) for d in range(len(view.shape))]
    found: list[tuple[int, Axis]] = []
    for dims, edge, extent, step in zip(group_dims(layout), view.edges, view.axes, scale_stride, strict=True):
        if edge == extent and not whole_blocks:
            edge, step = 1, 0
        several = [d for d in dims if view.shape[d] > 1]
        if edge not in (1, extent) and len(several) > 1:
            inside = _list_inside(several, view.shape, edge)
            if any(stride[a] != stride[b] * view.shape[b] for a, b in itertools.pairwise(inside)):
                return None
            whole_axis = Axis(math.prod(view.shape[d] for d in inside), edge, step, logical[inside[-1]])
            found.append((stride[inside[-1]], whole_axis))
            several, step, edge = several[: -len(inside)], step * whole_axis.extent // edge, 1
        for d in several:
            inner = math.prod(view.shape[b] for b in several if b > d)
            whole = edge == extent and edge > 1
            found.append((stride[d], Axis(view.shape[d], view.shape[d] if whole else edge, step * inner, logical[d])))
    axes: list[Axis] = []
    for _, axis in sorted(found, key=lambda pair: -pair[0]):
        joined = _join_axes(axes[-1], axis) if axes else None
        axes[-1:] = [joined] if joined is not None else [*axes[-1:], axis]
    return tuple(axes) or (Axis(1, 1, 0, 0),)


def _list_inside(dims: Sequence[int], shape: Sequence[int], edge: int) -> Sequence[int]:
    """Return the last dimensions that hold whole blocks: blocks of 64 of [16, 32, 32] lie inside of the last two."""
    first = len(dims) - 1
    while first and math.prod(shape[d] for d in dims[first:]) % edge:
        first -= 1
    return dims[first:]


def _join_axes(outer: Axis, inner: Axis) -> Axis | None:
    """Return two neighbors in memory as one axis with the same blocks; None if there is none."""
    if outer.logical != inner.logical * inner.extent:
        return None
    extent = outer.extent * inner.extent
    if inner.edge == inner.extent and (outer.edge > 1 or inner.edge > 1):
        return Axis(extent, outer.edge * inner.edge, outer.scale, inner.logical)
    if outer.edge == 1 and inner.extent % inner.edge == 0 and outer.scale == inner.scale * inner.extent // inner.edge:
        return Axis(extent, inner.edge, inner.scale, inner.logical)
    return None
