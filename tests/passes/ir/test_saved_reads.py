"""Which floats backward reads in a way that bends the rounding of codes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler


class Layer(nn.Module):
    """A function between two layers; of the first comes a float that nobody else holds."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(8, 64), nn.LazyLinear(4)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def split(function):
    return lambda h: function(*h.chunk(2, -1))


#: name → function, and the operator of backward that bends a float of it
BENT = {
    "quotient": (split(lambda a, b: a / b.exp()), "div"),
    "root": (lambda h: (h * h + 1e-6).sqrt(), "div"),
    "logarithm": (split(lambda a, b: a * (b * b + 0.1).log()), "mul"),
    "reciprocal": (lambda h: (h * h + 0.1) ** -1.0, "mul"),
    "cube": (lambda h: h**3, "pow"),
    "product of three": (lambda h: h * h * h, "mul"),
    "absolute value": (torch.abs, "sgn"),
    "statistic of a norm": (lambda h: F.rms_norm(h, (64,)), "pow"),
    "deviation": (lambda h: (h - h.mean(-1, True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt(), "div"),
    "sine": (torch.sin, "cos"),
}
#: linear in every float, or near enough: all of it is saved as codes
STRAIGHT = {
    "relu": F.relu,
    "product": split(lambda a, b: a * b),
    "square": lambda h: h**2,
    "gelu": F.gelu,
    "elu": F.elu,
    "log-sigmoid": F.logsigmoid,
    "layer norm": lambda h: F.layer_norm(h, (64,)),
    "exponential": torch.exp,
    "softmax": lambda h: h.softmax(-1),
}


def compile_layer(function, recipe="identity", save="int8"):
    torch.manual_seed(0)
    model = Layer(function)
    model(torch.randn(2, 8))  # the lazy layer takes its shape
    return qcompiler.compile(model, recipe, backend="eager", save=save), model


def list_bent(qmodel):
    return {kept.reason for kept in qmodel.plan().kept if "bent" in kept.reason}


@pytest.fixture(autouse=True)
def _fresh(fresh):
    """Nothing that Dynamo has captured before."""


@pytest.mark.parametrize("name", BENT)
def test_what_backward_bends_stays_in_float(name):
    function, operator = BENT[name]
    qmodel, _ = compile_layer(function)
    qmodel(torch.randn(16, 8)).sum().backward()
    assert f"saved in float: codes would be bent by {operator} of backward" in list_bent(qmodel)


@pytest.mark.parametrize("name", STRAIGHT)
def test_what_backward_multiplies_is_saved_as_codes(name):
    qmodel, _ = compile_layer(STRAIGHT[name])
    qmodel(torch.randn(16, 8)).sum().backward()
    assert not list_bent(qmodel)
    assert any(site.name.endswith("/saved") for site in qmodel.plan().sites)


@pytest.mark.sample(3)
@pytest.mark.parametrize("save", ["int8", "int4"])
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
@pytest.mark.parametrize("name", BENT)
def test_gradients_are_finite_where_those_of_float_are(name, recipe, save):
    """With codes of a divisor, 352 of 1,024 gradients of a quotient were infinite or NaN."""
    x = (2 * torch.randn(32, 8)).requires_grad_()
    plain, saving = (compile_layer(BENT[name][0], recipe, given)[0] for given in (None, save))
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    (found,) = torch.autograd.grad(saving(x).sum(), x)
    assert expected.isfinite().all()
    assert found.isfinite().all()
    assert found.abs().max() <= 4 * expected.abs().max()


@pytest.mark.parametrize(
    "function", [lambda h: F.normalize(h, dim=-1), BENT["deviation"][0]], ids=["norm", "deviation"]
)
def test_one_large_sample_spoils_no_other(function):
    """A scale that several samples share would round the statistics of the small ones to zero."""
    qmodel, model = compile_layer(function)
    x = torch.randn(64, 8)
    x[0] *= 500
    x.requires_grad_()
    grad = torch.randn(64, 4)
    (expected,) = torch.autograd.grad(model(x), x, grad)
    draws = torch.stack([torch.autograd.grad(qmodel(x), x, grad)[0] for _ in range(20)])
    error = (draws.mean(0) - expected)[1:].norm() / expected[1:].norm()
    assert error < 0.02  # a step is 2 / 127 of the largest of 64, and 20 draws are averaged
