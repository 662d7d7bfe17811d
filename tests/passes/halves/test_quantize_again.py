"""Codes of what is alive in backward are made again there."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.draw_in_forward import DrawInForward
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.quantize_again import QuantizeAgain
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_input
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def one_role(role, text):
    return Recipe(name="one", rules=(Rule(role=role, spec=parse_spec(text)),))


def weights(text):
    return one_role(Role.WEIGHT, text)


def layers():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


class Shared(nn.Module):
    """Three layers that read one input, quantized with a learned range, and a product of two of them."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (part(x) for part in self.parts)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_golden_again(in_front_of, settle_halves, text, golden):
    model = nn.Linear(4, 2, bias=False)
    halves = in_front_of(QuantizeAgain, weights("int4:fit:tensor:nearest:pass"), model, leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, QuantizeAgain()) == 2  # the packed codes and the scale
    golden(before=before, after=text(halves))


class Cast(nn.Module):
    """The layers in autocast, which is in the graph then."""

    def __init__(self):
        super().__init__()
        self.layers = layers()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


@pytest.mark.parametrize("build", [layers, Cast])
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "tensor-int4", "in-hindsight-w8a8g8", "current-w8a8g8"])
def test_no_code_of_a_parameter_is_saved(recipe, build, in_front_of, settle_halves):
    halves = in_front_of(QuantizeAgain, recipe, build(), leaf(3, 8))
    assert settle_halves(halves, QuantizeAgain()) > 0
    codes = {one.codes: one.tensor for one in list_quantizers(halves.forward.graph)}
    for node in halves.saved:
        tensor = codes.get(node.args[0] if node.target is ops.PACK else node)
        if tensor is not None and tensor.target is torch.ops.aten._to_copy.default:
            tensor = tensor.args[0]
        assert tensor is None or get_input(tensor) is None or get_input(tensor).kind is not InputKind.PARAMETER


def test_does_not_fire_on_activations(in_front_of, settle_halves, text):
    recipe = one_role(Role.ACTIVATION, "int8:fit:tensor:nearest:pass")
    halves = in_front_of(QuantizeAgain, recipe, nn.Linear(4, 2), leaf(3, 4))  # x has a gradient: it may be freed
    before = text(halves)
    assert settle_halves(halves, QuantizeAgain()) == 0
    assert text(halves) == before


def test_data_without_a_gradient_is_alive(in_front_of, settle_halves):
    recipe = one_role(Role.ACTIVATION, "int8:fit:tensor:nearest:pass")
    halves = in_front_of(QuantizeAgain, recipe, nn.Linear(4, 2), torch.randn(3, 4))
    settle_halves(halves, QuantizeAgain())
    assert [get_input(node).kind for node in halves.saved] == [InputKind.INPUT]


def test_a_scale_with_a_state_is_saved(in_front_of, settle_halves):
    text = "int8:real:tensor:nearest:pass:hindsight(0.9,0.01)"
    halves = in_front_of(QuantizeAgain, weights(text), nn.Linear(4, 2, bias=False), leaf(3, 4))
    settle_halves(halves, QuantizeAgain())
    scales = {one.scale for one in list_quantizers(halves.forward.graph)}
    assert any(node in scales or node.target is ops.CHECKED for node in halves.saved)
    assert not list(halves.backward.graph.find_nodes(op="call_function", target=ops.SCALE))


def test_does_not_fire_where_the_partitioner_quantizes_again_itself(in_front_of, settle_halves, text):
    recipe = one_role(Role.ACTIVATION, "int8:fit:tensor:nearest:pass")
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))  # the gradient of tanh keeps the float
    halves = in_front_of(QuantizeAgain, recipe, model, leaf(3, 8))
    before = text(halves)
    assert settle_halves(halves, QuantizeAgain()) == 0
    assert text(halves) == before


def test_does_not_fire_on_a_joint_graph_or_without_backward(in_front_of, text):
    halves = in_front_of(DrawInForward, "tensor-int8", nn.Linear(4, 2), leaf(3, 4))
    before = text(halves)
    assert QuantizeAgain()(Halves.of_forward(halves.forward, 1)) == 0
    assert text(halves) == before


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "text",
    [
        "int8:fit:tensor:nearest:pass",
        "int4:fit:b2c2o2i2:stochastic:pass",
        "affine4:real:tensor:nearest:pass",
        "int8:real:tensor:nearest:clip:hindsight(0.9,0.01)",
        "int4:real:tensor:stochastic:pass:hindsight(0.9,0.01)",
        "e2m1:two-level:b2c2o2i2:nearest:pass",
        "int8:real:tensor:nearest:pass:fixed(-1,1)",  # the partitioner makes the scale again by itself
        "int4:real:tensor:stochastic:clip:fixed(-0.1,0.1)",
    ],
)
@pytest.mark.parametrize("build", [layers, Cast])
def test_no_bit_changes(text, build, changes_no_bit):
    assert changes_no_bit(build, weights(text), [leaf(3, 8)], QuantizeAgain) > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0])
def test_special_weights_give_the_same_bits(bad, changes_no_bit):
    def build():
        model = layers()
        with torch.no_grad():
            model[0].weight[1, 2] = bad
        return model

    assert changes_no_bit(build, "tensor-int4", [leaf(3, 8)], QuantizeAgain) > 0


def test_an_empty_batch_gives_the_same_bits(changes_no_bit):
    assert changes_no_bit(layers, "tensor-int8", [leaf(0, 8)], QuantizeAgain) > 0


def test_convolutions_give_the_same_bits(changes_no_bit):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, groups=1))

    assert changes_no_bit(build, "hyperblock-int4", [leaf(2, 2, 6, 6)], QuantizeAgain) > 0


@pytest.mark.parametrize("recipe", ["int8-large-gradients", "int5-large-gradients"])
def test_a_scale_that_the_partitioner_computes_again_is_not_saved_beside_it(recipe, in_front_of, settle_halves):
    """Codes with another scale node than their dequantize are an illegal graph: the pass failed here."""
    halves = in_front_of(QuantizeAgain, recipe, Shared(), torch.randn(2, 5, 8))
    computed = {node.name for node in halves.backward.graph.find_nodes(op="call_function", target=ops.SCALE)}
    assert settle_halves(halves, QuantizeAgain()) > 0
    assert computed.isdisjoint(node.name for node in halves.saved)
    shared = [one for one in list_quantizers(halves.backward.graph) if one.scale.name in computed]
    assert shared
    assert {one.scale.op for one in shared} == {"call_function"}
