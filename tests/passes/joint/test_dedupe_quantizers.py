"""dedupe-quantizers: one quantizer for equal tensor, spec and layout."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.choose_blocks import ChooseBlocks
from qcompiler.passes.joint.dedupe_quantizers import DedupeQuantizers
from qcompiler.passes.joint.hoist_views import HoistViews
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.runtime import ops

DEDUPE = DedupeQuantizers()
HYPERBLOCK = "int8:fit:b2c2o2i2:nearest:pass"


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def count(captured, operator):
    return len(captured.module.graph.find_nodes(op="call_function", target=operator))


def test_golden_dedupe(placed, settle, golden):
    captured = placed("", nn.Conv1d(1, 2, 2, bias=False), leaf(1, 1, 3), gradient=HYPERBLOCK)
    before = graph_text(captured.module)
    assert settle(captured, DEDUPE) == 1
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize("kind", ["int8:fit", "int4:real", "affine8:real"])
def test_a_layer_quantizes_every_tensor_once(kind, placed, settle, run_graph, same_bits):
    captured = placed(f"{kind}:b2c2o2i2:nearest:pass", nn.Conv2d(2, 3, 2), leaf(2, 2, 3, 3))
    outputs = run_graph(captured)
    assert settle(captured, DEDUPE) == 3
    assert [count(captured, operator) for operator in (ops.QUANTIZE, ops.SCALE)] == [3, 3]
    assert count(captured, ops.ZERO_POINT) == (3 if kind.startswith("affine") else 0)
    assert (
        len([one.floats for one in list_dequantizers(captured.module.graph)]) == 6
    )  # each belongs to the half of its reader
    assert same_bits(run_graph(captured), outputs)


def test_matrices_meet_above_their_views(placed, apply, settle, run_graph, same_bits):
    captured = placed(HYPERBLOCK, nn.Linear(4, 3), leaf(2, 5, 4))
    outputs = run_graph(captured)
    apply(captured, HoistViews())
    assert settle(captured, DEDUPE) == 4  # the gradient is read by both products and the bias
    assert {codes.args[0].name for codes in [one.codes for one in list_quantizers(captured.module.graph)]} == {
        "primals_1",
        "primals_3",
        "tangents_1",
    }
    assert same_bits(run_graph(captured), outputs)


def test_the_readers_of_one_input_share_it(placed, apply, settle, run_graph, same_bits, function):
    parts = {name: nn.Linear(4, 3, bias=False) for name in "qkv"}
    captured = placed("", function(lambda m, x: m.q(x) + m.k(x) + m.v(x), **parts), leaf(2, 4), activation=HYPERBLOCK)
    outputs = run_graph(captured)
    assert settle(captured, DEDUPE) == 5
    (codes,) = [one.codes for one in list_quantizers(captured.module.graph)]
    assert codes.args[-1] in ("q/input", "k/input", "v/input")
    assert same_bits(run_graph(captured), outputs)


def test_masks_are_merged_with_their_scales(placed, apply, settle, function):
    model = function(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    captured = placed("", model, leaf(2, 4), activation="int8:max:tensor:nearest:clip")
    apply(captured, MaskGradients())
    assert count(captured, ops.IN_RANGE) == 2
    assert settle(captured, DEDUPE) == 3
    assert count(captured, ops.IN_RANGE) == 1


def test_two_readers_get_the_same_random_codes(placed, settle, run_graph, function):
    # without the pass the sites differ, and with them the random bits
    model = function(lambda m, x: m.a(x) - m.b(x), a=nn.Linear(16, 3), b=nn.Linear(16, 3))
    model.b.load_state_dict(model.a.state_dict())
    captured = placed("", model, torch.randn(2, 16), activation="int4:fit:tensor:stochastic:pass")
    assert run_graph(captured)[0].any()
    assert settle(captured, DEDUPE) == 3
    assert not run_graph(captured)[0].any()


@pytest.mark.parametrize(
    ("weight", "turned"),
    [("int8:fit:i2:nearest:pass", True), ("int4:fit:o2i2:nearest:pass", False)],
    ids=["block", "layout"],
)
def test_does_not_fire_where_codes_differ(weight, turned, placed, apply, settle):
    model, x = (nn.Conv1d(2, 2, 2), leaf(2, 2, 3)) if turned else (nn.Linear(4, 4), leaf(2, 4))
    captured = placed("", model, x, weight=weight)
    apply(captured, ChooseBlocks())
    before = graph_text(captured.module)
    assert settle(captured, DEDUPE) == 0
    assert graph_text(captured.module) == before


def test_does_not_fire_without_quantizers(placed, settle):
    captured = placed("", nn.Linear(4, 3), leaf(2, 4))
    before = graph_text(captured.module)
    assert settle(captured, DEDUPE) == 0
    assert graph_text(captured.module) == before
