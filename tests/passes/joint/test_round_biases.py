"""round-biases: in eval a layer of integers adds a whole number of its unit; nothing else is touched."""

import dataclasses

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.round_biases import RoundBiases
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.joint.thread_ranges import ThreadRanges
from qcompiler.passes.rules import Role, Rule
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

WEIGHT = "int7:real:i*s*:nearest:pass"
INPUT = "affine8:real:tensor:nearest:pass:hindsight(0.9,0.01)"


def rules(weight=WEIGHT, given=INPUT):
    return (Rule(role=Role.WEIGHT, spec=parse_spec(weight)), Rule(role=Role.ACTIVATION, spec=parse_spec(given)))


@pytest.fixture
def evaluated(joint, apply):
    """evaluated(model, input, rules) → its quantized eval graph, ranges of the past threaded."""

    def make(model, x, chosen=None):
        captured = joint(model.eval(), x)
        steps = PlaceQuantizers(chosen or rules()), ThreadRanges(frozen=True)
        apply(captured, SplitConvolutionBackward(), AnnotateRoles(), *steps)
        return captured

    return make


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def normalized(*layers, channels=4, **options):
    """Layers and a batch norm of random statistics."""
    norm = nn.BatchNorm2d(channels, **options)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return nn.Sequential(*layers, norm)


CASES = {
    "linear": (nn.Linear(4, 3), leaf(5, 4)),
    "tokens": (nn.Linear(4, 3), leaf(2, 5, 4)),
    "convolution": (nn.Conv2d(2, 3, 3), leaf(2, 2, 5, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), leaf(2, 4, 5, 5)),
    "one dimension": (nn.Conv1d(2, 3, 3), leaf(2, 2, 6)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3), leaf(2, 2, 5, 5)),
    "norm": (normalized(nn.Conv2d(2, 4, 3, bias=False)), leaf(2, 2, 5, 5)),
    "bias and norm": (normalized(nn.Conv2d(2, 4, 3)), leaf(2, 2, 5, 5)),
    "plain norm": (normalized(nn.Conv2d(2, 4, 3), affine=False), leaf(2, 2, 5, 5)),
}


def found(captured):
    return captured.module.graph.find_nodes(op="call_function", target=ops.INTEGER_BIAS)


@pytest.mark.parametrize(("model", "x"), CASES.values(), ids=CASES)
def test_each_layer_once(evaluated, settle, model, x):
    captured = evaluated(model, x)
    assert settle(captured, RoundBiases(active=True)) == 1
    (bias,) = found(captured)
    (reader,) = bias.users
    assert ("batch_norm" in str(reader.target)) == isinstance(model, nn.Sequential)


NOT = {
    "no bias": (nn.Linear(4, 3, bias=False), leaf(5, 4), rules()),
    "weights with powers of two": (nn.Linear(4, 3), leaf(5, 4), rules(weight="int8:max:i*:nearest:pass")),
    "a scale for each input channel": (nn.Linear(4, 3), leaf(5, 4), rules(weight="int8:real:o*:nearest:pass")),
    "float codes": (nn.Linear(4, 3), leaf(5, 4), rules(weight="e4m3:real:i*:nearest:pass")),
    "the range of each input": (nn.Linear(4, 3), leaf(5, 4), rules(given="affine8:real:tensor:nearest:pass")),
    "input in float": (nn.Linear(4, 3), leaf(5, 4), rules()[:1]),
    "weight in float": (nn.Linear(4, 3), leaf(5, 4), rules()[1:]),
}


@pytest.mark.parametrize(("model", "x", "chosen"), NOT.values(), ids=NOT)
def test_does_not_fire(evaluated, settle, model, x, chosen):
    assert settle(evaluated(model, x, chosen), RoundBiases(active=True)) == 0


def test_does_not_fire_where_it_is_not_asked_for(evaluated, settle):
    captured = evaluated(*CASES["linear"])
    before = graph_text(captured.module)
    assert settle(captured, RoundBiases()) == 0
    assert graph_text(captured.module) == before


def test_a_norm_that_is_not_alone_is_no_part_of_the_layer(evaluated, settle, function):
    """The sum of both readers: the convolution's own bias is rounded, that of the norm is not."""

    def both(self, x):
        y = self.conv(x)
        return self.norm(y) + y

    captured = evaluated(function(both, conv=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3)), leaf(2, 2, 5, 5))
    assert settle(captured, RoundBiases(active=True)) == 1
    (reader,) = found(captured)[0].users
    assert reader.target is torch.ops.aten.convolution.default


@pytest.fixture
def integers():
    """The two recipes of a pair: with integer biases, and without."""
    recipe = qcompiler.RECIPES["deploy-int8"]
    return recipe, dataclasses.replace(recipe, name="float-biases", integer_biases=False)


def test_eval_adds_whole_numbers_and_training_is_as_before(integers, fresh, eager):
    """One layer with inputs and weights of one step: what eval returns is a whole number of the unit."""
    layer = nn.Linear(4, 3)
    models = [eager(nn.Sequential(layer), recipe) for recipe in integers]
    x = torch.randn(6, 4)
    trained = [model(x) for model in models]
    assert torch.equal(*trained)
    for outputs in trained:
        outputs.sum().backward()
    whole, plain = (model.eval()(x).double() for model in models)
    scale = layer.weight.abs().amax(1).double() / 63
    low, high = models[0].ranges()["0/input"].double().flatten()[:2]
    unit = scale * (high - low) / 255
    counts = whole / unit
    # sums of 4 products below 255·63 units: float32 rounds each of them, and the scales, by 2^-24
    assert (counts - counts.round()).abs().max() < 8 * 2.0**-24 * 4 * 255 * 63
    others = plain / unit
    assert (others - others.round()).abs().max() > 0.05
    assert ((whole - plain).abs() / unit).max() < 0.501


def test_gradients_pass_in_eval(integers, fresh, eager):
    """The gradient of a rounded bias is that of the bias."""
    layer = nn.Linear(4, 3)
    model = eager(nn.Sequential(layer), integers[0])
    model(torch.randn(6, 4)).sum().backward()
    layer.bias.grad = None
    model.eval()(torch.randn(6, 4)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 6.0))
