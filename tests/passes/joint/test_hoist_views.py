"""hoist-views: quantizing above a view gives the same blocks, or the view is not passed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph

from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.hoist_views import HoistViews, layout_above
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import AXES, Block, parse_block

HOIST = HoistViews()
NEAREST = "int8:fit:b2c2o2i2:nearest:pass"


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def view_of(x, target, *args):
    """A graph node that is a view of x."""
    graph = Graph()
    source = graph.placeholder("x")
    source.meta["val"] = x
    node = graph.call_function(target, (source, *args))
    node.meta["val"] = target(x, *args)
    return node


PERMUTE, RESHAPE, TRANSPOSE = aten.permute.default, aten.reshape.default, aten.transpose.int


@pytest.mark.parametrize(
    ("shape", "target", "args", "below", "block", "above"),
    [
        # 1. permutations
        ((3, 4), aten.t.default, (), "cb", "b2c2", "bc"),
        ((4,), aten.t.default, (), "c", "c2", "c"),
        ((2, 3, 4), TRANSPOSE, (1, 2), "gcb", "b2c2", "gbc"),
        ((2, 3, 4), TRANSPOSE, (-1, 0), "cob", "b2c2", "boc"),
        ((2, 3, 4), PERMUTE, ([2, 0, 1],), "cbs", "b2c2", "bsc"),
        ((2, 3, 4), PERMUTE, ([-1, 0, 1],), "cbs", "b2c2", "bsc"),
        ((2, 3, 4, 5), PERMUTE, ([0, 1, 3, 2],), "bcss", "s2", "bcss"),  # an edge of space holds for each dimension
        # 4. an axis flattened in another order
        ((2, 3, 4), PERMUTE, ([0, 2, 1],), "bcc", "c2", None),
        ((2, 3, 4), PERMUTE, ([0, 2, 1],), "bcc", "b2", "bcc"),
        ((2, 3, 4), PERMUTE, ([0, 2, 1],), "bcc", "c*", "bcc"),
        ((2, 3, 4), PERMUTE, ([0, 2, 1],), "bbc", "tensor", None),  # b, c, b is no layout
        # 2. reshapes
        ((2, 5, 4), RESHAPE, ([10, 4],), "bc", "b4c2", "bbc"),
        ((10, 4), RESHAPE, ([2, 5, 4],), "bbc", "b4c2", "bc"),
        ((2, 3, 4, 4), RESHAPE, ([2, 48],), "bc", "b2c16", "bccc"),
        ((5, 2, 2, 4), RESHAPE, ([10, 2, 4],), "gbc", "g4", "ggbc"),
        ((4, 6), RESHAPE, ([6, 4],), "bb", "b5", "bb"),
        ((4, 5, 5), aten.unsqueeze.default, (0,), "bcss", "b4c2", "css"),
        ((1, 4, 5), aten.squeeze.dim, (0,), "cs", "c2", "ccs"),
        ((2, 1, 3), aten.squeeze.dims, ([1],), "bc", "b2c2", "bcc"),
        ((2, 3), RESHAPE, ([2, 1, 3],), "bgc", "b2c2", "bc"),
        ((2, 3), aten.expand.default, ([1, 2, 3],), "gbc", "b2c2", "bc"),
        ((2, 3, 1), RESHAPE, ([2, 3],), "bc", "b2c2", "bcc"),
        ((1, 1), RESHAPE, ([1, 1, 1],), "bcs", "c2", "bb"),
        ((), RESHAPE, ([1, 1],), "bc", "tensor", ""),
        ((1,), RESHAPE, ([],), "", "tensor", "b"),
        # 4. two letters meet in one dimension
        ((2, 12), RESHAPE, ([2, 3, 4],), "bcs", "tensor", None),
        ((4, 6), RESHAPE, ([6, 4],), "bc", "b2c2", None),
        ((6,), RESHAPE, ([2, 3],), "bc", "each", None),
        # 4. edges of space tile other rows
        ((2, 12), RESHAPE, ([2, 3, 4],), "bss", "s2", None),
        ((2, 12), RESHAPE, ([2, 3, 4],), "bss", "b2", "bs"),
        ((2, 12), RESHAPE, ([2, 3, 4],), "bss", "s*", "bs"),
        ((2, 3, 4), RESHAPE, ([2, 12],), "bs", "s4", None),
        # 3. copies and aliases
        ((2, 3), aten.clone.default, (), "bc", "b2c2", "bc"),
        ((2, 3), aten.detach.default, (), "cb", "b2c2", "cb"),
        ((2, 3), aten.alias.default, (), "oi", "o2", "oi"),
    ],
)
def test_layout_above(shape, target, args, below, block, above):
    assert layout_above(view_of(torch.zeros(shape), target, *args), below, parse_block(block)) == above


@st.composite
def views(draw):
    """(tensor, operator, its arguments): a permutation or a reshape of a small tensor."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        return x, PERMUTE, draw(st.permutations(range(len(shape))))
    factors = [f for extent in shape for f in ((2, 2) if extent == 4 and draw(st.booleans()) else (extent,))]
    merged: list[int] = []
    for factor in factors:
        if merged and draw(st.booleans()):
            merged[-1] *= factor
        else:
            merged.append(factor)
    for at in draw(st.lists(st.integers(0, len(merged)), max_size=1)):
        merged.insert(at, 1)
    return x, RESHAPE, merged


@st.composite
def layouts(draw, ndim):
    """A letter for each dimension, equal ones side by side."""
    letters = draw(st.permutations(list(AXES)))
    runs = sorted(draw(st.integers(0, ndim - 1)) for _ in range(ndim))
    return "".join(letters[run] for run in runs)


BLOCKS = st.builds(Block, **{axis: st.sampled_from([0, 1, 2, 3]) for axis in AXES.values()})


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_quantizing_above_is_quantizing_below(data):
    x, target, args = data.draw(views())
    below = target(x, args)
    layout, block = data.draw(layouts(below.ndim)), data.draw(BLOCKS)
    above = layout_above(view_of(x, target, args), layout, block)
    if above is None:
        return
    text = f"int4:fit:{block}:nearest:pass"

    def quantized(tensor, letters):
        scale = ops.SCALE(tensor, text, letters)
        codes = ops.QUANTIZE(tensor, scale, None, None, text, letters, "")
        return ops.DEQUANTIZE(codes, scale, None, text, letters, torch.float32)

    assert torch.equal(target(quantized(x, above), args), quantized(below, layout)), (args, layout, above, block)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(views(), st.data())
def test_one_scale_for_all_passes_every_view_of_one_letter(view, data):
    x, target, args = view
    letter = data.draw(st.sampled_from([*AXES]))
    node = view_of(x, target, args)
    assert layout_above(node, letter * target(x, args).ndim, parse_block("tensor")) == letter * x.ndim


def test_golden_hoist(placed, settle, golden):
    captured = placed("", nn.Linear(4, 3, bias=False), leaf(2, 4), weight=NEAREST)
    before = graph_text(captured.module)
    assert settle(captured, HOIST) == 3  # Wᵀ, and (Wᵀ)ᵀ twice
    golden(before=before, after=graph_text(captured.module))


def read(captured):
    """The names of the tensors that quantizers read."""
    return {codes.args[0].name for codes in [one.codes for one in list_quantizers(captured.module.graph)]}


@pytest.mark.parametrize(
    ("model", "shape", "sources"),
    [
        (lambda m, x: m.tokens(x), (2, 5, 4), {"primals_1", "primals_3", "tangents_1"}),
        # channels meet space in one axis in the order of memory: above the copy, not above the transpose
        (lambda m, x: m.flat(x.transpose(1, 2).flatten(1)), (2, 4, 3), {"transpose", "primals_2", "tangents_1"}),
        # one tensor each for all readers, below a permutation of dimensions of extent 1
        (lambda m, x: torch.einsum("ti,oi->to", x, m.tokens.weight), (5, 4), {"permute_2", "permute_3", "permute_5"}),
        (lambda m, x: x @ x.transpose(-1, -2), (2, 5, 4), {"primals_1", "tangents_1"}),
    ],
    ids=["tokens", "flattened", "einsum", "attention"],
)
def test_values_do_not_change(model, shape, sources, placed, settle, run_graph, same_bits, function):
    captured = placed(NEAREST, function(model, tokens=nn.Linear(4, 3), flat=nn.Linear(12, 2)), leaf(*shape))
    outputs = run_graph(captured)
    assert settle(captured, HOIST) > 0
    assert read(captured) == sources
    assert same_bits(run_graph(captured), outputs)


def test_zero_points_move_too(placed, settle, run_graph, same_bits):
    captured = placed("affine8:real:b2c2o2i2:nearest:pass", nn.Linear(4, 3), leaf(2, 5, 4))
    outputs = run_graph(captured)
    assert settle(captured, HOIST) == 9
    assert read(captured) == {"primals_1", "primals_3", "tangents_1"}
    assert same_bits(run_graph(captured), outputs)


def test_stochastic_quantizers_move_too(placed, settle, function):
    model = function(lambda m, x: m.fc(x.t()), fc=nn.Linear(4, 3, bias=False))
    captured = placed("", model, leaf(4, 2), activation="int4:fit:b2c2:stochastic:pass")
    assert settle(captured, HOIST) == 2
    assert read(captured) == {"primals_1"}
    first, second = [one.codes for one in list_quantizers(captured.module.graph)]
    assert first.args[3] is second.args[3] is not None


def test_does_not_fire_without_views(placed, settle):
    captured = placed(NEAREST, nn.Conv2d(2, 3, 2), leaf(2, 2, 3, 3))
    before = graph_text(captured.module)
    assert settle(captured, HOIST) == 0
    assert graph_text(captured.module) == before


def test_a_mask_moves_with_its_quantizer(placed, apply, settle, run_graph):
    captured = placed("", nn.Linear(4, 3, bias=False), leaf(2, 4), weight="int8:max:tensor:nearest:clip")
    apply(captured, MaskGradients())
    before = run_graph(captured)
    assert settle(captured, HOIST) > 0
    (mask,) = captured.module.graph.find_nodes(op="call_function", target=ops.IN_RANGE)
    assert get_value(mask).shape == (3, 4)  # the weight itself, not its transpose
    assert read(captured) == {"primals_1"}
    for old, new in zip(before, run_graph(captured), strict=True):
        assert torch.equal(old, new)
