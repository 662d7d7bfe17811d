"""choose-blocks: which blocks are legal, which are turned, which operands stay in float."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.facts import Operand
from qcompiler.passes.ir.meta import get_value, iterate_contractions
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.choose_blocks import ChooseBlocks, is_legal
from qcompiler.passes.rules import Role
from qcompiler.runtime.numbers.blocks import parse_block
from qcompiler.runtime.spec import parse_spec

CHOOSE = ChooseBlocks()


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def spec(block):
    return f"int8:real:{block}:nearest:pass"


def by_rows(x):
    """Rows [n] rounded to 255 levels each, up to their largest magnitude: the block c* of the layout bc."""
    step = x.abs().amax(1, keepdim=True) / 127
    return torch.round(x / step) * step


def by_columns(x):
    """The same over the columns: the block b*."""
    return by_rows(x.t()).t()


@pytest.mark.parametrize(
    ("block", "contracted", "extent", "legal"),
    [
        ("c2", "c", 16, True),
        ("c16", "c", 16, True),
        ("c32", "c", 16, True),  # one block, larger than the axis
        ("c*", "c", 16, True),
        ("c2", "c", 3, True),  # a last block of one element
        ("each", "c", 2, False),
        ("each", "c", 1, True),  # depthwise: nothing is summed
        ("each", "c", 0, True),
        ("c16", "b", 4, False),
        ("c16", "b", 1, True),
        ("b4c16", "b", 4, True),
        ("b4c16", "c", 16, True),
        ("b4", "c", 16, False),
        ("i16", "i", 16, True),
        ("i16", "o", 16, False),
        ("o16i16", "o", 16, True),
        ("c16", "i", 16, False),  # edges of activations say nothing about weights
        ("s4", "c", 16, False),
        ("g4", "c", 16, False),
        ("tensor", "c", 16, True),
        ("tensor", "o", 16, True),
    ],
)
def test_is_legal(block, contracted, extent, legal):
    operand = Operand(0, Role.ACTIVATION, "input", "bc", contracted, extent)
    assert is_legal(parse_block(block), operand) is legal


def test_golden_blocks(placed, settle, golden):
    captured = placed("", nn.Linear(4, 3, bias=False), torch.randn(2, 4), activation=spec("c2"))
    before = graph_text(captured.module)
    assert settle(captured, CHOOSE) == 1
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize("block", ["b2c2o2i2", "tensor", "b*c2o2i*"])
def test_does_not_fire_where_every_block_is_legal(block, placed, settle):
    captured = placed(spec(block), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), leaf(4, 4))
    before = graph_text(captured.module)
    assert settle(captured, CHOOSE) == 0
    assert graph_text(captured.module) == before


@pytest.mark.parametrize("block", ["c*i*", "b*o*"])
def test_a_block_of_one_axis_is_turned_for_half_of_the_contractions(block, placed, settle, run_graph, same_bits):
    model, x = nn.Linear(4, 3), leaf(5, 4)
    captured = placed(spec(block), model, x)
    # operands that do not sum over the axis of the block: both of dW and G of db for channels; the other four for batch
    assert settle(captured, CHOOSE) == (4 if block == "c*i*" else 3)
    w, b, x = (t.detach() for t in (model.weight, model.bias, x))
    torch.manual_seed(1)
    g = torch.randn(5, 3)
    columns = by_columns(g)
    expected = [
        torch.addmm(b, by_rows(x), by_rows(w).t()),
        columns.t() @ by_columns(x),
        columns.sum(0),
        by_rows(g) @ by_columns(w),
    ]
    assert same_bits(run_graph(captured, seed=1), expected)


def test_a_turned_quantizer_says_so(placed, settle):
    captured = placed(spec("c2i2"), nn.Conv2d(2, 3, 2), leaf(2, 2, 3, 3))
    settle(captured, CHOOSE)
    found = sorted(
        (codes.args[-1], str(parse_spec(codes.args[4]).block))
        for codes in [one.codes for one in list_quantizers(captured.module.graph)]
    )
    assert found == [
        ("(root)/grad", "c2i2"),
        ("(root)/grad.turned", "b2o2"),
        ("(root)/input", "c2i2"),
        ("(root)/input.turned", "b2o2"),
        ("(root)/weight", "c2i2"),
        ("(root)/weight.turned", "b2o2"),
    ]


@pytest.mark.parametrize("kind", ["affine8:real:c2i2:nearest:pass", "int8:fit:c2i2:stochastic:pass"])
def test_zero_points_and_keys_turn_with_the_block(kind, placed, settle, run_graph):
    captured = placed(kind, nn.Conv2d(2, 3, 2), leaf(2, 2, 3, 3))
    assert settle(captured, CHOOSE) == 3
    for codes in [one.codes for one in list_quantizers(captured.module.graph)]:
        for part in codes.args[1:3]:
            assert part is None or get_value(part).shape == get_value(codes.args[1]).shape
    assert all(out.isfinite().all() for out in run_graph(captured))


@pytest.mark.parametrize("block", ["each", "s2", "g2"])
def test_an_operand_without_a_legal_block_stays_in_float(block, placed, settle, run_graph, same_bits):
    model, x = nn.Conv2d(2, 3, 2), leaf(2, 2, 3, 3)
    captured = placed(spec(block), model, x)
    assert settle(captured, CHOOSE) == 6
    assert not [one.codes for one in list_quantizers(captured.module.graph)]
    facts = [fact for _, fact in iterate_contractions(captured.module.graph)]
    assert [[operand.kept for operand in fact.operands] for fact in facts] == [
        [f"block {block} has edge 1 along the summed axis '{letter}', turned or not" for letter in letters]
        for letters in ("ci", "bb", "co")
    ]
    untouched = placed("", model, x)
    assert same_bits(run_graph(captured), run_graph(untouched))


def test_only_the_operands_without_a_legal_block_stay(placed, settle):
    captured = placed(spec("o2i2"), nn.Linear(4, 3, bias=False), torch.randn(2, 4))
    assert settle(captured, CHOOSE) == 3  # X, and G and X in the weight gradient
    assert [codes.args[-1] for codes in [one.codes for one in list_quantizers(captured.module.graph)]] == [
        "(root)/weight"
    ]


def test_depthwise_needs_no_edge_along_channels(placed, settle):
    captured = placed(spec("b2"), nn.Conv2d(4, 4, 2, groups=4), leaf(2, 4, 3, 3))
    assert settle(captured, CHOOSE) == 0
    (forward,) = captured.module.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert [parse_spec(arg.args[3]).block for arg in forward.args[:2]] == [parse_block("b2")] * 2
