"""Derivatives of activation functions are saved in place of their inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.save_derivatives import SaveDerivatives
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import SAVINGS
from qcompiler.runtime.spec import parse_spec

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
}
SAVE8, SAVE4 = (Recipe(name=save, rules=(SAVINGS[save],)) for save in ("int8", "int4"))
DERIVE8, DERIVE4 = SaveDerivatives(SAVE8.rules), SaveDerivatives(SAVE4.rules)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def layer(function, act):
    """Return a layer and a function behind it: the output of the layer cannot be made again for nothing."""
    return function(lambda m, x: act(m.fc(x)), fc=nn.Linear(4, 6, bias=False))


def test_golden_derivatives(in_front_of, settle_halves, text, golden, function):
    halves = in_front_of(SaveDerivatives, SAVE4, layer(function, F.silu), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, DERIVE4) == 1
    golden(before=before, after=text(halves))


@pytest.mark.parametrize("save", ["int8", "int4"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_range_holds_every_derivative(name, save, in_front_of, settle_halves, function):
    recipe = Recipe(name=save, rules=(SAVINGS[save],))
    halves = in_front_of(SaveDerivatives, recipe, layer(function, FUNCTIONS[name]), leaf(3, 4))
    assert settle_halves(halves, SaveDerivatives(recipe.rules)) == 1
    (one,) = list_quantizers(halves.forward.graph)
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    low, high, codes = one.spec.range.low, one.spec.range.high, one.spec.format.largest
    step = (high - low) / codes
    point = round(-low / step)
    rounded = 1e-5  # ends are written with 5 digits
    assert -point * step <= min(slope.min().item(), 0) + rounded
    assert (codes - point) * step >= slope.max().item() - rounded
    tight = slope.max().item() - min(slope.min().item(), 0)  # with a code at zero at most one more code is free
    assert step <= (tight + 0.003) / (codes - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_is_off_by_less_than_a_step(name, bits, in_front_of, function):
    """Stochastic rounding takes one of the two codes beside a number."""
    torch._dynamo.reset()
    model, x, grad = layer(function, FUNCTIONS[name]), 3 * torch.randn(64, 4), torch.randn(64, 6)
    y = model.fc(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(FUNCTIONS[name](y), y, grad)
    qmodel = qcompiler.compile(model, "identity", backend="eager", save=f"int{bits}")
    x.requires_grad_()
    (found,) = torch.autograd.grad(qmodel(x), x, grad)
    bound = grad.abs() * (2.05 if name == "hardswish" else 1.33) / (2**bits - 1)  # |G| · step, widened ends included
    allowed = bound @ model.fc.weight.abs() + 1e-5
    assert ((found - expected @ model.fc.weight).abs() <= allowed).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0])
@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "sigmoid"])
def test_gradients_are_finite_where_those_of_float_are(name, bad, function):
    torch._dynamo.reset()
    model, x = function(lambda m, x: FUNCTIONS[name](m.n(x)), n=nn.Linear(1, 1)), torch.tensor([[bad], [1.0]])
    nn.init.ones_(model.n.weight)
    nn.init.zeros_(model.n.bias)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    qmodel = qcompiler.compile(model, "identity", backend="eager", save="int8")
    (found,) = torch.autograd.grad(qmodel(x).sum(), x)
    assert found.isfinite()[0] or not expected.isfinite()[0]
    assert expected.isfinite()[0] or not found.isfinite()[0]  # nothing that is not finite gets lost


def test_does_not_fire_without_a_rule(in_front_of, settle_halves, text, function):
    halves = in_front_of(SaveDerivatives, "identity", layer(function, F.silu), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, SaveDerivatives()) == 0
    kept = Rule(role=Role.SAVED, spec=None, reason="a test")
    assert settle_halves(halves, SaveDerivatives((kept, *SAVE8.rules))) == 0
    elsewhere = Rule(role=Role.SAVED, spec=SAVE8.rules[0].spec, module="other.*")
    assert settle_halves(halves, SaveDerivatives((elsewhere,))) == 0
    assert text(halves) == before


def test_does_not_fire_for_other_functions(in_front_of, settle_halves, text, function):
    halves = in_front_of(SaveDerivatives, SAVE8, layer(function, lambda y: y * y), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, DERIVE8) == 0
    assert text(halves) == before


@pytest.mark.parametrize(
    ("act", "derivatives"), [(lambda y: F.silu(y) * y, 1), (lambda y: F.silu(y) + F.gelu(y), 2)], ids=["product", "two"]
)
def test_each_function_has_a_derivative_of_its_own(act, derivatives, in_front_of, settle_halves, function):
    halves = in_front_of(SaveDerivatives, SAVE8, layer(function, act), leaf(3, 4))
    assert settle_halves(halves, DERIVE8) == derivatives


def test_does_not_fire_where_a_contraction_has_the_codes(in_front_of, settle_halves):
    spec = parse_spec("int8:fit:tensor:nearest:pass")
    recipe = Recipe(name="both", rules=(Rule(role=Role.ACTIVATION, spec=spec), *SAVE8.rules))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))  # the gradient of tanh reads its result
    assert settle_halves(in_front_of(SaveDerivatives, recipe, model, leaf(3, 4)), DERIVE8) == 0
    more = Recipe(name="short", rules=(Rule(role=Role.ACTIVATION, spec=parse_spec(str(spec).replace("8", "4"))),))
    recipe = Recipe(name="both", rules=(*more.rules, *SAVE8.rules))  # codes of 4 bits are too short
    assert settle_halves(in_front_of(SaveDerivatives, recipe, model, leaf(3, 4)), DERIVE8) == 1


def test_does_not_fire_without_backward(in_front_of, function):
    halves = in_front_of(SaveDerivatives, SAVE8, layer(function, F.silu), leaf(3, 4))
    assert DERIVE8(Halves.of_forward(halves.forward, 1)) == 0
