"""Blocks by dimension, as ONNX counts them: the same as by axis, as the runtime does, also if extents are free."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.exporting.blocks import Edges, find_edges, spread_scale
from qcompiler.exporting.storage import shape_by_dimension
from qcompiler.runtime.numbers.blocks import AXES, TENSOR, Block, parse_block, view_blocks

PROPERTY = settings(derandomize=True, deadline=None, max_examples=500)
BLOCKS = st.builds(Block, **dict.fromkeys(AXES.values(), st.integers(0, 8)))


@st.composite
def splits(draw):
    """A shape of 1–4 dimensions of 1–7, a legal layout for it, and a block with edges up to beyond the extents."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    letters, place, layout = draw(st.permutations(list(AXES))), 0, ""
    for _ in shape:
        layout += letters[place]
        place += draw(st.integers(0, 1))
    return shape, layout, draw(BLOCKS)


def test_edges_by_dimension():
    edges = find_edges((None, 12, 4, 4), "bcss", parse_block("c8"))
    assert edges == Edges((1, 8, 1, 1), (None, 12, 4, 4))
    assert (edges.split, edges.counts) == ((1,), (None, 2, 4, 4))
    assert find_edges((3, 5), "bc", parse_block("c8")).edges == (1, 0)
    assert spread_scale(Edges((1, 2), (2, 3)), np.array([[1, 2], [3, 4]])).tolist() == [[1, 1, 2], [3, 3, 4]]
    with pytest.raises(ValueError, match="along a dynamic axis"):
        find_edges((2, None), "bc", parse_block("c8"))
    assert find_edges((2, 3, 5), "bcc", parse_block("c8")) == Edges((1, 8), (2, 15), joined=True)


@given(splits())
@PROPERTY
def test_each_element_has_the_scale_that_the_runtime_gives_it(case):
    """Same number of blocks, in the same order; a scale of the runtime, brought to dimensions, means the same."""
    shape, layout, block = case
    view, edges = view_blocks(shape, layout, block), find_edges(shape, layout, block)
    scale = torch.arange(math.prod(view.counts)).reshape(view.counts)
    spread = spread_scale(edges, shape_by_dimension(scale.numpy(), edges))
    assert np.array_equal(spread.reshape(shape), view.spread(scale).numpy())


@given(splits(), st.integers(0, 3))
@PROPERTY
def test_a_free_extent_is_refused_or_changes_nothing_else(case, dim):
    """Whatever size the free dimension turns out to have, the edges are those of that size."""
    shape, layout, block = case
    dim %= len(shape)
    free = tuple(None if d == dim else extent for d, extent in enumerate(shape))
    try:
        edges = find_edges(free, layout, block)
    except ValueError:
        # refused only if blocks cut the free axis, or one in front of it that is flattened
        assert any(block.edge(letter) > 1 for letter in layout)
        return
    fixed = find_edges(shape, layout, block)
    at = [d for d, extent in enumerate(edges.extents) if extent is None]
    assert len(at) == 1
    assert edges.edges == fixed.edges
    assert edges.joined == fixed.joined
    assert edges.counts[at[0]] == (1 if edges.edges[at[0]] == 0 else None)
    assert [n for d, n in enumerate(edges.counts) if d not in at] == [
        n for d, n in enumerate(fixed.counts) if d not in at
    ]


def test_whole_tensors_and_single_elements_have_any_free_extents():
    for block, edge in ((TENSOR, 0), (Block(), 1)):
        assert find_edges((None, None, 3), "bbc", block) == Edges((edge,) * 3, (None, None, 3))


@pytest.mark.parametrize(
    ("extents", "layout", "block", "message"),
    [
        ((None, 6), "bc", "b2", "blocks of 2 along a dynamic axis; keep that axis fixed"),
        ((4, None), "bb", "b2", "blocks of 2 along a dynamic axis"),
        ((4, 4, None), "bbc", "b2", "a dynamic axis behind dimensions that blocks run over as one; keep that axis"),
    ],
)
def test_refused(extents, layout, block, message):
    with pytest.raises(ValueError, match=message):
        find_edges(extents, layout, parse_block(block))
