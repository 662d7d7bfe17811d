"""Blocks: their text, which elements they hold (against the oracle), and the views that split and spread."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.numbers.blocks import AXES, TENSOR, WHOLE, Block, check_layout, parse_block, view_blocks

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300)
EDGES = st.integers(0, 10)
BLOCKS = st.builds(Block, **dict.fromkeys(AXES.values(), EDGES))


@st.composite
def splits(draw: Callable[..., Any]) -> tuple[tuple[int, ...], str, Block]:
    """A shape of 1–4 dimensions of 0–9, a legal layout for it, and edges up to beyond the extents."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    letters, place, layout = draw(st.permutations(list(AXES))), 0, ""
    for _ in shape:
        layout += letters[place]
        place += draw(st.integers(0, 1))
    return shape, layout, draw(BLOCKS)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (Block(), "each"),
        (TENSOR, "tensor"),
        (Block(batch=4, channel=16), "b4c16"),
        (Block(out=16, in_=16), "o16i16"),
        (Block(batch=WHOLE, space=WHOLE), "b*s*"),
        (Block(group=3, channel=2, space=12), "c2s12g3"),
    ],
)
def test_text(block: Block, text: str) -> None:
    assert str(block) == text
    assert parse_block(text) == block


@given(BLOCKS)
@PROPERTY
def test_text_round_trip(block: Block) -> None:
    assert parse_block(str(block)) == block


def test_other_spellings_that_parse() -> None:
    assert parse_block("c16b4") == Block(batch=4, channel=16)
    assert parse_block("b*c1") == Block(batch=WHOLE)
    assert parse_block("b*c*s*o*i*g*") == TENSOR


@pytest.mark.parametrize(
    "text", ["", "b", "4", "x4", "b4b4", "b4x2", "b-1", "b4 c4", "b4,c4", "b**", "b4each", "b4:", "b0c8", "b08"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^block: got .*; valid: 'tensor', 'each', or each axis once .*\(axes: b=batch"
    ):
        parse_block(text)


@pytest.mark.parametrize("name", AXES.values())
@pytest.mark.parametrize("edge", [-1, 2.0, "4", None])
def test_edge_refused(name: str, edge: Any) -> None:
    with pytest.raises(ValueError, match=rf"^block: edge {name}={edge!r} is not valid; give a positive integer, or 0"):
        Block(**{name: edge})


def test_transposed_and_per_sample() -> None:
    block = Block(batch=2, channel=3, space=4, out=5, in_=6, group=7)
    assert block.transposed() == Block(batch=3, channel=2, space=4, out=6, in_=5, group=7)
    assert block.transposed().transposed() == block
    assert block.per_sample() == Block(batch=1, channel=3, space=4, out=5, in_=6, group=1)


def test_edge_by_letter() -> None:
    block = Block(batch=2, channel=3, space=4, out=5, in_=6, group=7)
    assert [block.edge(letter) for letter in "bcsoig"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("shape", "layout", "text", "counts", "edges"),
    [
        ((8, 6), "bc", "each", (8, 6), (1, 1)),
        ((8, 6), "bc", "tensor", (1, 1), (8, 6)),
        ((8, 6), "bc", "b4c4", (2, 2), (4, 4)),
        ((8, 6), "bc", "b100", (1, 6), (8, 1)),
        ((2, 5, 6), "bbc", "b4c3", (3, 2), (4, 3)),  # tokens: one batch axis of 10
        ((2, 6, 5, 7), "bcss", "b*s4", (1, 6, 2, 2), (2, 1, 4, 4)),  # space: 4×4 on each dimension of its own
        ((4, 3, 3, 3), "oiss", "o2i*s*", (2, 1, 1, 1), (2, 3, 3, 3)),
        ((0, 6), "bc", "b4c4", (0, 2), (1, 4)),
        ((3, 0), "bc", "tensor", (1, 0), (3, 1)),
        ((), "", "tensor", (), ()),
    ],
)
def test_counts(shape: tuple, layout: str, text: str, counts: tuple, edges: tuple) -> None:
    view = view_blocks(shape, layout, parse_block(text))
    assert (view.counts, view.edges) == (counts, edges)


@given(splits())
@PROPERTY
def test_split_puts_each_element_into_its_block(oracle: ModuleType, split: tuple[tuple[int, ...], str, Block]) -> None:
    shape, layout, block = split
    view = view_blocks(shape, layout, block)
    number, counts = oracle.block_numbers(shape, layout, {letter: block.edge(letter) for letter in AXES})
    assert view.counts == counts
    # element i carries i + 1, so that the filling (0) can be told from every element
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    blocks = view.split(x)
    assert tuple(blocks.shape[1::2]) == view.edges
    numbers = torch.arange(math.prod(counts)).reshape([n for count in counts for n in (count, 1)]).expand(blocks.shape)
    kept = blocks != 0
    assert sorted(blocks[kept].tolist()) == x.flatten().tolist()
    assert np.array_equal(number.ravel()[blocks[kept].numpy() - 1], numbers[kept].numpy())


@given(splits())
@PROPERTY
def test_spread_gives_each_element_the_value_of_its_block(
    oracle: ModuleType, split: tuple[tuple[int, ...], str, Block]
) -> None:
    shape, layout, block = split
    view = view_blocks(shape, layout, block)
    number, counts = oracle.block_numbers(shape, layout, {letter: block.edge(letter) for letter in AXES})
    spread = view.spread(torch.arange(math.prod(counts)).reshape(counts))
    assert tuple(spread.shape) == shape
    assert np.array_equal(spread.numpy(), number.reshape(shape))


def test_filling_is_zero() -> None:
    blocks = view_blocks((5,), "c", Block(channel=3)).split(torch.ones(5))
    assert blocks.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_inner_dimensions_reduce_a_block() -> None:
    view = view_blocks((4, 6), "bc", Block(batch=2, channel=3))
    sums = view.split(torch.ones(4, 6)).sum(view.inner)
    assert sums.tolist() == [[6, 6], [6, 6]]


@pytest.mark.parametrize("layout", ["", "b", "bcs", "bx", "B1", "b "])
def test_layout_refused(layout: str) -> None:
    with pytest.raises(ValueError, match=f"^layout: got '{layout}' for 2 dimensions; valid: one letter of bcsoig"):
        check_layout(layout, 2)


@pytest.mark.parametrize("layout", ["bcb", "scs", "oio"])
def test_layout_with_a_torn_axis_refused(layout: str) -> None:
    with pytest.raises(ValueError, match=f"^layout: got '{layout}' for 3 dimensions; .* equal letters side by side$"):
        view_blocks((2, 2, 2), layout, Block())
