"""Convolutions of codes are computed on the codes."""

import pytest
import torch
from torch import nn
from uniform_recipes import uniform

from qcompiler.passes.halves.halves import finish_halves
from qcompiler.passes.halves.lower_convolutions import LowerConvolutions
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.runtime import ops
from qcompiler.runtime.kernels import convolutions, table

LOWER = LowerConvolutions(Execution.INTEGER)


#: why the kernels that read images do not run on this processor; empty: they do
REASON = next((one for one in (convolutions.load_forward(), convolutions.load_gradient()) if isinstance(one, str)), "")
LAYERS = [
    (nn.Conv1d(3, 4, 3), (2, 3, 8)),
    (nn.Conv2d(3, 4, (3, 2), (1, 2), 1), (2, 3, 7, 6)),
    (nn.Conv2d(3, 4, 1, 3, bias=False), (2, 3, 7, 6)),
    (nn.Conv3d(2, 4, 2, dilation=2), (2, 2, 4, 5, 4)),
]


@pytest.fixture
def only_patches(monkeypatch):
    """The table without kernels that read images, as on a processor without the instructions."""
    monkeypatch.setattr(table, "CONVOLUTIONS", ())


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def reasons(halves):
    facts = [fact for half in halves.graphs for _, fact in iterate_contractions(half.graph)]
    return {str(fact.product): fact.simulated for fact in facts if fact.simulated}


def count_calls(halves, target):
    return sum(len(half.graph.find_nodes(op="call_function", target=target)) for half in halves.graphs)


@pytest.mark.usefixtures("only_patches")
@pytest.mark.parametrize("recipe", ["tensor-int8", "tensor-int4", "in-hindsight-w8a8g8", "lsq-w4a4"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_all_three_products(layer, shape, recipe, in_front_of, settle_halves):
    halves = in_front_of(LowerConvolutions, recipe, layer, leaf(*shape))
    products = 3 if recipe != "lsq-w4a4" else 1  # whose gradients stay in float
    assert settle_halves(halves, LOWER) == count_calls(halves, ops.MATMUL_CODES) == products
    assert count_calls(halves, ops.TURN_TAPS) == products // 3
    assert count_calls(halves, ops.PATCHES) == 5 if products == 3 else 2
    assert reasons(halves) == {}
    finish_halves(halves)


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("recipe", ["tensor-int8", "tensor-int4", "in-hindsight-w8a8g8", "lsq-w4a4"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_kernels_read_images(layer, shape, recipe, in_front_of, settle_halves):
    """Neither patches nor turned taps, and each operand is described as the contraction reads it."""
    halves = in_front_of(LowerConvolutions, recipe, layer, leaf(*shape))
    before = sum(len(half.graph.nodes) for half in halves.graphs)
    products = 3 if recipe != "lsq-w4a4" else 1
    assert settle_halves(halves, LOWER) == products
    calls = [count_calls(halves, one) for one in (ops.CONVOLVE_CODES, ops.CONVOLVE_INPUT, ops.CONVOLVE_GRADIENT)]
    assert calls == ([1, 1, 1] if products == 3 else [1, 0, 0])
    assert count_calls(halves, ops.PATCHES) == count_calls(halves, ops.TURN_TAPS) == 0
    assert sum(len(half.graph.nodes) for half in halves.graphs) <= before
    assert reasons(halves) == {}
    finish_halves(halves)


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_golden_image(in_front_of, settle_halves, text, golden):
    recipe = uniform("int8:fit:tensor:nearest:pass")
    halves = in_front_of(LowerConvolutions, recipe, nn.Conv2d(2, 4, 3, 2, 1), leaf(2, 2, 5, 5))
    before = text(halves)
    settle_halves(halves, LOWER)
    golden(before=before, after=text(halves))


@pytest.mark.usefixtures("only_patches")
def test_golden_convolution(in_front_of, settle_halves, text, golden):
    recipe = uniform("int8:fit:tensor:nearest:pass")
    halves = in_front_of(LowerConvolutions, recipe, nn.Conv2d(2, 4, 3, 2, 1), leaf(2, 2, 5, 5))
    before = text(halves)
    settle_halves(halves, LOWER)
    golden(before=before, after=text(halves))


def test_does_not_fire_in_simulation(in_front_of, settle_halves, text):
    halves = in_front_of(LowerConvolutions, "tensor-int8", nn.Conv2d(2, 2, 3), leaf(2, 2, 4, 4))
    before = text(halves)
    assert settle_halves(halves, LowerConvolutions()) == 0
    assert text(halves) == before
    assert reasons(halves) == {}


def test_matrices_are_left_alone(in_front_of, settle_halves, text):
    halves = in_front_of(LowerConvolutions, "tensor-int8", nn.Linear(4, 2), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, LOWER) == 0
    assert text(halves) == before
    assert reasons(halves) == {}


FORWARD, INPUT, WEIGHT = "forward", "input-gradient", "weight-gradient"
ALL = (FORWARD, INPUT, WEIGHT)
#: a scale for each output channel; for the input gradient, which sums over those, one for each input channel
PER_CHANNEL = uniform("int8:fit:tensor:nearest:pass", weight="int8:fit:i*s*:nearest:pass")


@pytest.mark.usefixtures("only_patches")
@pytest.mark.parametrize(
    ("recipe", "model", "shape", "lowered", "reason"),
    [
        ("tensor-int8", nn.Conv2d(4, 4, 3, groups=2), (2, 4, 5, 5), (), "no kernel computes convolutions of 2 groups"),
        ("tensor-int8", nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5), (), "no kernel computes transposed convolutions"),
        ("tensor-int8", nn.Conv2d(4, 2, 3, 2, dilation=2), (2, 4, 7, 7), (FORWARD, WEIGHT), "with stride and dilation"),
        (uniform("int8:fit:b2o2c2i2:nearest:pass"), nn.Conv2d(4, 4, 3), (4, 4, 5, 5), (), "along the summed axis"),
        (PER_CHANNEL, nn.Conv2d(4, 4, 3), (4, 4, 5, 5), ALL, ""),
        (PER_CHANNEL, nn.Conv2d(4, 4, 3, 2), (4, 4, 5, 5), (FORWARD, WEIGHT), "change along the input channels"),
        (
            uniform("int8:fit:tensor:nearest:pass", activation="int8:fit:c*s*:nearest:pass"),
            nn.Conv2d(4, 4, 3),
            (4, 4, 5, 5),
            (FORWARD, INPUT),
            "changes along the summed axis",
        ),
        (
            uniform("int8:fit:tensor:nearest:pass", weight="affine8:real:tensor:nearest:pass"),
            nn.Conv2d(4, 4, 3, 2),
            (4, 4, 5, 5),
            (FORWARD, WEIGHT),
            "zeros fill up its taps",
        ),
        (uniform("e4m3:fit:tensor:nearest:pass"), nn.Conv2d(4, 4, 3), (4, 4, 5, 5), (), "e4m3 is no integer"),
        ("tensor-int8", nn.Conv2d(1, 2, 1), (2, 1, 5, 5), (), "needs two elements along every axis"),
        ("tensor-int8", nn.Conv2d(4, 4, 3, dtype=torch.float64), (2, 4, 5, 5), (), "the result is float64"),
    ],
)
def test_what_stays_has_its_reason(recipe, model, shape, lowered, reason, in_front_of, settle_halves):
    x = leaf(*shape).to(next(model.parameters()).dtype).detach().requires_grad_()
    halves = in_front_of(LowerConvolutions, recipe, model, x)
    assert settle_halves(halves, LOWER) == len(lowered)
    assert sorted(reasons(halves)) == sorted(set(ALL) - set(lowered))
    assert all(reason in text for text in reasons(halves).values())


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize(
    ("recipe", "stride", "lowered"),
    [
        (uniform("int8:fit:b2c2s*o2i2:nearest:pass"), 1, ALL),
        (uniform("int8:fit:b2c2s*o2i2:nearest:pass"), 2, ALL),
        (uniform("int8:fit:b3c2s*o2i2:nearest:pass"), 1, ALL),
        (uniform("int8:fit:b2c2o2i2:nearest:pass"), 1, ()),
        (PER_CHANNEL, 2, ALL),
        (uniform("int8:fit:tensor:nearest:pass", activation="int8:fit:c*s*:nearest:pass"), 1, (FORWARD, INPUT, WEIGHT)),
        (uniform("int8:fit:tensor:nearest:pass", activation="affine8:real:c2s*:nearest:pass"), 1, (INPUT,)),
        (uniform("int8:fit:tensor:nearest:pass", activation="affine8:real:c*s*:nearest:pass"), 1, (FORWARD, INPUT)),
    ],
)
def test_kernels_of_images_add_runs(recipe, stride, lowered, in_front_of, settle_halves):
    """Scales may change along the channels, and along the samples of a weight gradient; zero points may not."""
    halves = in_front_of(LowerConvolutions, recipe, nn.Conv2d(4, 4, 3, stride), leaf(4, 4, 5, 5))
    assert settle_halves(halves, LOWER) == len(lowered)
    assert sorted(reasons(halves)) == sorted(set(ALL) - set(lowered))
    assert all("along the summed axis" in text for text in reasons(halves).values())
    finish_halves(halves)


@pytest.mark.usefixtures("only_patches")
def test_the_result_has_the_strides_of_the_convolution(in_front_of, settle_halves):
    """A contiguous model reads the product through a copy; channels last reads the product as it is."""
    for order, copies in ((torch.contiguous_format, 3), (torch.channels_last, 0)):
        x = leaf(2, 4, 5, 5).detach().contiguous(memory_format=order).requires_grad_()
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()).to(memory_format=order)
        halves = in_front_of(LowerConvolutions, "tensor-int8", model, x)
        before = count_calls(halves, ops.LAY_OUT)
        assert settle_halves(halves, LOWER) == 3
        finish_halves(halves)
        assert count_calls(halves, ops.LAY_OUT) - before == copies


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_kernels_write_the_order_of_the_convolution(order, in_front_of, settle_halves):
    x = leaf(2, 4, 5, 5).detach().contiguous(memory_format=order).requires_grad_()
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2), nn.ReLU()).to(memory_format=order)
    halves = in_front_of(LowerConvolutions, "tensor-int8", model, x)
    before = count_calls(halves, ops.LAY_OUT)
    assert settle_halves(halves, LOWER) == 3
    finish_halves(halves)
    assert count_calls(halves, ops.LAY_OUT) == before


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_weights_with_a_zero_point_are_read_as_patches(in_front_of, settle_halves):
    recipe = uniform("int8:fit:tensor:nearest:pass", weight="affine8:real:tensor:nearest:pass")
    halves = in_front_of(LowerConvolutions, recipe, nn.Conv2d(4, 4, 3), leaf(2, 4, 5, 5))
    assert settle_halves(halves, LOWER) == 3
    assert [count_calls(halves, one) for one in (ops.MATMUL_CODES, ops.CONVOLVE_GRADIENT)] == [2, 1]


@pytest.mark.usefixtures("only_patches", "fast_integers")
def test_auto_leaves_narrow_convolutions(in_front_of, settle_halves):
    """Copying an element takes as long as the 16 products in float that read it."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))
    halves = in_front_of(LowerConvolutions, "tensor-int8", model, leaf(4, 32, 16, 16))
    assert settle_halves(halves, LowerConvolutions(Execution.AUTO)) == 4
    assert set(reasons(halves).values()) == {"float is as fast for patches that 16 products read; valid: 32 or more"}


def test_halves_share_no_new_name(in_front_of, settle_halves):
    """What both halves have is taken for computed again."""
    halves = in_front_of(LowerConvolutions, "tensor-int8", nn.Conv2d(2, 4, 3, 2, 1), leaf(2, 2, 5, 5))
    names = [{node.name for node in half.graph.nodes if node.op == "call_function"} for half in halves.graphs]
    settle_halves(halves, LOWER)
    after = [{node.name for node in half.graph.nodes if node.op == "call_function"} for half in halves.graphs]
    assert after[0] & after[1] <= names[0] & names[1]
