"""Names start at the model, whatever its author calls the argument that is the module."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompiler

# Dynamo looks at the .grad of its inputs, here tensors between two graphs, and hides the warning, but not from "error"
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]
X, Y = torch.linspace(-1, 1, 48).reshape(8, 6).sin(), torch.arange(8) % 4


def passes_on(function: Any) -> Any:
    """What decorators of libraries do."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def usual(self: Any, x: Tensor) -> Tensor:
    return self.b(self.norm(self.a(x)).relu())


def short(s: Any, x: Tensor) -> Tensor:
    return s.b(s.norm(s.a(x)).relu())


def rest(*args: Any) -> Tensor:
    return args[0].b(args[0].norm(args[0].a(args[1])).relu())


def rest_and_option(*args: Any, scale: float = 1.0) -> Tensor:
    return args[0].b(args[0].norm(args[0].a(args[1] * scale)).relu())


@passes_on
def decorated(self: Any, x: Tensor) -> Tensor:
    return self.b(self.norm(self.a(x)).relu())


def usual_break(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    print(end="")
    return self.b(self.norm(x).relu())


def short_break(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    print(end="")
    return s.b(s.norm(x).relu())


def end(x: Tensor, norm: nn.Module, layer: nn.Module) -> Tensor:
    print(end="")
    return layer(norm(x).relu())


def helper_break(s: Any, x: Tensor) -> Tensor:
    return end(s.a(x), s.norm, s.b)


def build(forward: Any) -> nn.Module:
    """Two layers and a batch norm between them, which counts batches in training alone."""
    torch.manual_seed(0)
    kind = type("Model", (nn.Module,), {"forward": forward})
    model = kind()
    model.a, model.norm, model.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
    return model


def train(eager, forward: Any) -> tuple[qcompiler.QuantizedModule, Tensor]:
    """The model after two steps, and what it then gives in eval mode."""
    torch._dynamo.reset()
    model = eager(build(forward), "in-hindsight-w8a8g8")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sgd.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        sgd.step()
    with torch.no_grad():
        return model, model.eval()(X)


@pytest.mark.parametrize(
    ("forward", "like"),
    [
        (short, usual),
        (rest, usual),
        (rest_and_option, usual),
        (decorated, usual),
        (short_break, usual_break),
        (helper_break, None),
    ],
)
def test_evaluation_reads_the_ranges_of_training(eager, forward, like):
    model, out = train(eager, forward)
    names = [{site.name for site in model.plan(training=mode).sites} for mode in (True, False)]
    assert names[1] == {name for name in names[0] if not name.endswith("/grad")}
    assert not any("@" in name for name in names[0])
    assert model.ranges().keys() <= names[0]
    if like is not None:
        twin, expected = train(eager, like)
        assert torch.equal(out, expected)
        assert model.ranges().keys() == twin.ranges().keys()


class Score(nn.Module):
    """A product of activations, and no parameter by which to tell one of these from another."""

    scale = 0.5

    def forward(module, x: Tensor) -> Tensor:  # noqa: N805
        print(end="")
        return x @ x.transpose(-1, -2) * module.scale


def test_modules_without_parameters_have_ranges_of_their_own(eager):
    model = nn.Sequential(nn.Linear(6, 6), Score(), nn.Linear(8, 8), Score())
    compiled = eager(model, "in-hindsight-w8a8g8")
    for _ in range(2):
        compiled(X).sum().backward()
    names = {name.split("/")[0] for name in compiled.ranges()}
    assert names == {"0", "1", "2", "3"}
