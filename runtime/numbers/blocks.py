"""Blocks: the groups of elements that share one scale, and the view with each block in dimensions of its own.

A *layout* names every dimension of a tensor by one letter (`AXES`); a `Block` gives each axis an edge. Neighboring
dimensions with the same letter are one axis, flattened in order: a token activation [B, T, C] has the layout `bbc` and
a batch axis of B·T. Space is the exception: the edge holds for each spatial dimension on its own (4 means 4×4).
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import Final

import torch
import torch.nn.functional as F

#: letter of a layout → field of `Block`
AXES: Final = {"b": "batch", "c": "channel", "s": "space", "o": "out", "i": "in_", "g": "group"}
#: the edge that covers an axis whole
WHOLE: Final = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Edges of a block along the named axes, in elements; 1 = a scale for each index, `WHOLE` (0) = one for all.

    Activations and gradients have the axes batch, channel, space; weights have out, in_, space (the taps); `group`
    counts independent matrices of a batched product (samples × heads of attention). An edge need not divide the shape:
    the last block is then smaller.

    `str(block)` lists the edges that are not 1 (`b4c16`, `o16i16`, `b1…` is `each`, all whole is `tensor`).

    Raises:
        ValueError: a negative edge.
    """

    batch: int = 1
    channel: int = 1
    space: int = 1
    out: int = 1
    in_: int = 1
    group: int = 1

    def __post_init__(self) -> None:
        for name in AXES.values():
            edge = getattr(self, name)
            if not isinstance(edge, int) or edge < 0:
                raise ValueError(
                    f"block: edge {name}={edge!r} is not valid; give a positive integer, or 0 for the whole axis"
                )

    def edge(self, letter: str) -> int:
        """Return the edge along the axis that a layout calls `letter`."""
        return int(getattr(self, AXES[letter]))

    def transposed(self) -> "Block":
        """The block with batch and channel, out and in exchanged: the same number of elements, the other way round."""
        return dataclasses.replace(self, batch=self.channel, channel=self.batch, out=self.in_, in_=self.out)

    def per_sample(self) -> "Block":
        """Return the block with a batch edge of 1: no result of a sample depends on the batch mates."""
        return dataclasses.replace(self, batch=1, group=1)

    def __str__(self) -> str:
        if self == TENSOR:
            return "tensor"
        edges = ((letter, self.edge(letter)) for letter in AXES)
        return "".join(f"{letter}{edge or '*'}" for letter, edge in edges if edge != 1) or "each"


TENSOR: Final = Block(batch=0, channel=0, space=0, out=0, in_=0, group=0)


def parse_block(text: str) -> Block:
    """Return the block that `str` wrote: `b4c16`, `o16i16`, `b*c1s*`, `tensor`, `each`.

    Raises:
        ValueError: empty text, unknown axis letter, repeated axis, or no edge above 0 behind a letter.
    """
    if text in ("tensor", "each"):
        return TENSOR if text == "tensor" else Block()
    pairs = re.findall(r"([a-z])([1-9]\d*|\*)", text)
    letters = [letter for letter, _ in pairs]
    whole = pairs and "".join(letter + edge for letter, edge in pairs) == text
    if not whole or len(set(letters)) != len(letters) or set(letters) - set(AXES):
        raise ValueError(
            f"block: got {text!r}; valid: 'tensor', 'each', or each axis once with its edge, such as 'b4c16o16i16' or "
            f"'c*s*' (axes: {', '.join(f'{k}={v}' for k, v in AXES.items())}; * = the whole axis)"
        )
    return Block(**{AXES[letter]: WHOLE if edge == "*" else int(edge) for letter, edge in pairs})


@dataclasses.dataclass(frozen=True)
class BlockView:
    """How a tensor of `shape` and `layout` splits into blocks.

    `split(x)` has two dimensions for each axis: the index of the block and the index inside. All extents are known
    and every axis is flattened, so that kept scales have one shape; files of ONNX, whose extents may be free and whose
    dimensions stay apart, have a description of their own (`Edges` in qcompiler/exporting/blocks.py).
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]  # extent of each axis: runs of equal letters flattened
    edges: tuple[int, ...]  # edge along each axis, at most the extent, at least 1

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Blocks along each axis: ⌈extent / edge⌉. The shape of the tensor of scales."""
        return tuple(-(-extent // edge) for extent, edge in zip(self.axes, self.edges, strict=True))

    @functools.cached_property
    def is_whole(self) -> bool:
        """True if one block covers the tensor; False if that depends on a free dimension."""
        return all(type(count) is int and count == 1 for count in self.counts)

    @functools.cached_property
    def inner(self) -> tuple[int, ...]:
        """The dimensions of `split(x)` that lie inside a block."""
        return tuple(2 * i + 1 for i in range(len(self.axes)))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[*shape] → [count₀, edge₀, count₁, edge₁, …]; a last, smaller block is filled up with zeros.

        Zero is a level of every format and part of every range, so the filling changes no scale.
        """
        x = x.reshape(self.axes)
        missing = [
            count * edge - extent for count, edge, extent in zip(self.counts, self.edges, self.axes, strict=True)
        ]
        if any(missing):
            x = F.pad(x, [pad for fill in reversed(missing) for pad in (0, fill)])
        return x.reshape([n for pair in zip(self.counts, self.edges, strict=True) for n in pair])

    def meet(self, scale: torch.Tensor) -> torch.Tensor:
        """[count₀, count₁, …] → a tensor that broadcasts to `shape`: for each element the value of the block."""
        return scale.reshape([1] * len(self.shape)) if self.is_whole else self.spread(scale)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """[count₀, count₁, …] → [*shape]: for each element the value of the block.

        Elementwise work stays on the tensor in its own memory order, and reads this one beside.
        """
        if self.is_whole:
            return scale.reshape([1] * len(self.shape)).expand(self.shape)
        repeats = []
        for dim, (extent, edge) in enumerate(zip(self.axes, self.edges, strict=True)):
            partial = extent % edge != 0
            if partial:
                # by index, and not (j // edge): if Inductor finds a loop variable divided by more than 8, Inductor
                # splits the loop into extent // edge whole parts and drops the last, smaller block (torch 2.13,
                # `try_loop_split`). (2j + 1) // (2·edge) is the same number: 40 elements by 24 are 0…23, 24…39.
                block = (2 * torch.arange(extent, device=scale.device) + 1) // (2 * edge)
                scale = scale.index_select(dim, block)
            repeats.append(1 if partial else edge)
        y = scale.reshape([n for count in scale.shape for n in (count, 1)])
        y = y.expand([n for pair in zip(scale.shape, repeats, strict=True) for n in pair])
        return y.reshape(self.shape)


def view_blocks(shape: tuple[int, ...], layout: str, block: Block) -> BlockView:
    """Return the split of `shape` into blocks; layout has one letter of `AXES` for each dimension.

    Raises:
        ValueError: the layout does not fit the shape, has an unknown letter, or repeats a letter with others between.
    """
    known = all(type(extent) is int for extent in shape)  # a free dimension has no hash
    return _view_known(shape, layout, block) if known else _view_any(shape, layout, block)


def _view_any(shape: tuple[int, ...], layout: str, block: Block) -> BlockView:
    check_layout(layout, len(shape))
    groups = group_dims(layout)
    axes = tuple(math.prod(shape[d] for d in dims) for dims in groups)
    letters = [layout[dims[0]] for dims in groups]
    pairs = zip(letters, axes, strict=True)
    return BlockView(shape, axes, tuple(max(1, min(block.edge(letter) or extent, extent)) for letter, extent in pairs))


def group_dims(layout: str) -> list[list[int]]:
    """Return the dimensions of every axis: neighbors with the same letter; of space each dimension is an axis."""
    runs = [list(run) for _, run in itertools.groupby(range(len(layout)), key=lambda d: layout[d])]
    return [dims for run in runs for dims in ([[d] for d in run] if layout[run[0]] == "s" else [run])]


#: every check of a graph, and every step that runs node by node, asks for the same few
_view_known: Final = functools.lru_cache(maxsize=10_000)(_view_any)


def check_layout(layout: str, ndim: int) -> None:
    """Raises ValueError if `layout` is not a legal naming of `ndim` dimensions."""
    runs = [letter for letter, _ in itertools.groupby(layout)]
    if len(layout) != ndim or set(layout) - set(AXES) or len(set(runs)) != len(runs):
        raise ValueError(
            f"layout: got {layout!r} for {ndim} dimensions; valid: one letter of {''.join(AXES)} for each dimension, "
            "equal letters side by side"
        )
