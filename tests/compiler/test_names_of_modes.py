"""Sites have one name in training and in evaluation, however the forward of a model is written, wrapped or broken."""

import functools
import types

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Net(nn.Module):
    """Batch norm has an input in training that it lacks in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(self.b(self.n(self.a(x)).relu()))


class Short(Net):
    def forward(s, x):  # noqa: N805
        return s.c(s.b(s.n(s.a(x)).relu()))


def decorate(function):
    def wrapper(*args):
        return function(*args)

    return wrapper


class Decorated(Net):
    forward = decorate(Net.forward)


class Autocast(Net):
    @torch.autocast("cpu", enabled=False)
    def forward(net, x):  # noqa: N805
        return net.c(net.b(net.n(net.a(x)).relu()))


def method() -> nn.Module:
    model = Net()
    model.forward = types.MethodType(lambda net, x: Net.forward(net, x), model)
    return model


def partial() -> nn.Module:
    model = Net()
    old = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda module, *args: old(*args), model), old)
    return model


def closure() -> nn.Module:
    model = Net()
    old = model.forward
    model.forward = lambda *args: old(*args)
    return model


def broken_closure() -> nn.Module:
    """The function that breaks goes on to the model itself, also where a copy of the model is called."""
    model = Net()
    old = model.forward

    def forward(x):
        print(end="")
        return old(x)

    model.forward = forward
    return model


class Locals(Net):
    """Behind the break `self` is dead."""

    def forward(self, x):
        n, b, c = self.n, self.b, self.c
        h = self.a(x)
        print(end="")
        return c(b(n(h).relu()))


def helper(layer, norm, x):
    print(end="")
    return norm(layer(x)).relu()


class Helped(Net):
    def forward(self, x):
        return self.c(self.b(helper(self.a, self.n, x)))


class BrokenInTraining(Net):
    def forward(self, x):
        h = self.a(x)
        if self.training:
            print(end="")
        return self.c(self.b(self.n(h).relu()))


class Parts(Net):
    """Dynamo gives the forward up, and captures two methods of the model."""

    def one(self, x):
        return self.n(self.a(x)).relu()

    def two(self, x):
        return self.c(self.b(x))

    def forward(self, x):
        for part in (self.one, self.two):
            print(end="")
            x = part(x)
        return x


class Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x):
        return self.model.b(self.model.n(self.model.a(x)).relu())


class Run(Net):
    """An object that is no module leads back to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = Runner(self)

    def forward(self, x):
        y = self.runner.run(x)
        print(end="")
        return self.c(y)


MODELS = {
    "named otherwise": Short,
    "decorated": Decorated,
    "autocast": Autocast,
    "method": method,
    "partial": partial,
    "closure": closure,
    "broken closure": broken_closure,
    "locals": Locals,
    "helper": Helped,
    "broken in training": BrokenInTraining,
    "parts": Parts,
    "runner": Run,
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return build()


def outputs(model: nn.Module, compiled, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One training step, and the evaluation after it."""
    trained = compiled.train()(batch)
    trained.square().sum().backward()
    with torch.no_grad():
        return trained, compiled.eval()(batch)


@pytest.mark.sample(1)
@models
def test_evaluation_is_that_of_the_plain_model(eager, build):
    """Bitwise, with the ends in int8, and ranges of the past; `Net` is captured as a whole, with `self`."""
    batch = torch.randn(16, 8)
    for recipe in ("hyperblock-int4", "in-hindsight-w8a8g8"):
        plain, model = built(Net), built(build)
        compiled, expected = eager(model, recipe), eager(plain, recipe)
        for found, wanted in zip(outputs(model, compiled, batch), outputs(plain, expected, batch), strict=True):
            assert torch.equal(found, wanted)
        names = [
            {(s.name, s.spec.format) for s in compiled.plan(training=t).sites if s.is_forward} for t in (True, False)
        ]
        assert names[0] == names[1]
        assert {name.partition("/")[0] for name, _ in names[0]} == {"a", "b", "c"}
        assert all(torch.equal(*pair) for pair in zip(model.buffers(), plain.buffers(), strict=True))


@pytest.mark.sample(2)
@models
def test_a_frozen_norm_keeps_the_ranges(eager, build):
    model = built(build)
    compiled, batch = eager(model, "in-hindsight-w8a8g8"), torch.randn(16, 8)
    compiled(batch).square().sum().backward()
    names = set(compiled.ranges())
    model.n.eval().requires_grad_(False)
    compiled(batch).square().sum().backward()
    assert set(compiled.ranges()) == names


def test_instances_of_a_helper_stay_apart(eager):
    """One function for two layers: two names, in both modes."""

    class Two(Net):
        def forward(self, x):
            return self.c(helper(self.b, self.n, helper(self.a, self.n, x)))

    compiled, batch = eager(built(Two), "in-hindsight-w8a8g8"), torch.randn(16, 8)
    outputs(compiled, compiled, batch)
    for training in (True, False):
        layers = {site.name.partition("/")[0] for site in compiled.plan(training=training).sites}
        assert layers == {"a", "b", "c"}
