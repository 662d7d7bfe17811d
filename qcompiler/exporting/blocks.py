"""Blocks dimension by dimension, as ONNX counts them: for shapes with extents that are not known before, too."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from qcompiler.runtime.numbers.blocks import WHOLE, Block

#: an extent of a tensor: a number, or None for a dynamic axis
Extent = int | None


@dataclasses.dataclass(frozen=True)
class Edges:
    """The edge of a block along each dimension: 1, a number, or `WHOLE`.

    A `BlockView` of the runtime flattens every axis and cuts every edge to a number, which needs all extents; a file
    has free extents and joins dimensions by a node of its own, so it joins only those that blocks run over as one.
    """

    edges: tuple[int, ...]
    extents: tuple[Extent, ...]
    #: True if dimensions of the tensor were joined, since blocks run over the joined dimensions as one
    joined: bool = False

    @property
    def split(self) -> tuple[int, ...]:
        """The dimensions whose blocks are neither single elements nor the whole dimension."""
        return tuple(d for d, edge in enumerate(self.edges) if edge not in (1, WHOLE))

    @property
    def counts(self) -> tuple[Extent, ...]:
        """Blocks along each dimension."""
        return tuple(
            1 if edge == WHOLE else extent if edge == 1 or extent is None else -(-extent // edge)
            for edge, extent in zip(self.edges, self.extents, strict=True)
        )


def spread_scale(edges: Edges, scale: np.ndarray, skip: Sequence[int] = ()) -> np.ndarray:
    """Return a scale of shape `counts`, repeated to the extents of all dimensions but those in `skip`."""
    for dim, (edge, extent) in enumerate(zip(edges.edges, edges.extents, strict=True)):
        if dim not in skip and extent is not None and edge != 1:
            scale = np.repeat(scale, edge or extent, dim).take(range(extent), dim)
    return scale


def find_edges(extents: Sequence[Extent], layout: str, block: Block) -> Edges:
    """Return the edges of `block` by dimension; equal letters that blocks run over as one become one dimension.

    Raises:
        ValueError: blocks cut a dynamic axis in parts, or one lies behind joined dimensions.
    """
    edges: list[int] = []
    sizes: list[Extent] = []
    done = 0
    dims = zip(layout, extents, strict=True)
    for letter, run in itertools.groupby(dims, key=lambda pair: pair[0]):
        own = [extent for _, extent in run]
        if len(sizes) < done and None in own:
            raise ValueError("a dynamic axis behind dimensions that blocks run over as one; keep that axis fixed")
        done += len(own)
        edge = block.edge(letter)
        parts = edge not in (1, WHOLE)
        if parts and None in own:
            raise ValueError(f"blocks of {edge} along a dynamic axis; keep that axis fixed")
        if parts and letter != "s":
            own = [math.prod(extent for extent in own if extent is not None)]
        edges += [WHOLE if parts and edge >= (size or 0) else edge for size in own]
        sizes += own
    return Edges(tuple(edges), tuple(sizes), joined=len(sizes) < len(extents))
