"""Evaluation calls layers as training does, so it reads their ranges: whatever breaks the graph of one alone."""

import dataclasses
import functools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qcompiler
from qcompiler.compiler.naming import PLAIN, ModelNames

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


@pytest.mark.sample(2)
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


def break_in(*modes: bool) -> Any:
    """A forward with a graph break in some modes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training in modes:
            print(end="")
        return self.b(self.norm(x).relu())

    return forward


@pytest.mark.parametrize("modes", [(True,), (False,), (True, False)], ids=str)
def test_a_break_in_one_mode(eager, modes):
    model, _ = train(eager, break_in(*modes))
    twin, _ = train(eager, break_in())
    for mode in (True, False):
        names, expected = ({site.name for site in one.plan(training=mode).sites} for one in (model, twin))
        assert names == expected
    assert model.ranges().keys() == twin.ranges().keys()


class Checkpointed(nn.Module):
    """A model that logs in training and recomputes a part of it, as large models do."""

    def __init__(self, logs: bool, reentrant: bool) -> None:
        super().__init__()
        self.logs, self.reentrant = logs, reentrant
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.b(self.a(x).tanh())
        if self.logs:
            logging.getLogger("a model").debug("recomputing")
        return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant).tanh())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_log(eager, reentrant):
    outs = []
    for logs in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = eager(Checkpointed(logs, reentrant), "in-hindsight-w8a8g8")
        for _ in range(2):
            F.cross_entropy(model(X.clone().requires_grad_()), Y).backward()
        with torch.no_grad():
            outs.append(model.eval()(X))
        plan = model.plan(training=False)
        assert {site.name.split("/")[0] for site in plan.sites} == {"a", "b"}
        assert not any("no range from training" in note for note in plan.notes)
    assert torch.equal(*outs)


class Other(nn.Module):
    """Evaluation runs a layer that training does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.training else self.a(x) + self.b(x.sin())


def test_a_layer_without_training_is_noted(eager):
    model = eager(Other(), "in-hindsight-w8a8g8")
    model(X).sum().backward()
    with torch.no_grad():
        model.eval()(X)
    (note,) = (note for note in model.plan(training=False).notes if "no range from training" in note)
    assert note.startswith("b/input, b/output: ")
    assert not any("no range from training" in note for note in model.plan().notes)


@pytest.mark.parametrize("switch", [(False, True), (True, False)], ids=str)
def test_a_break_that_comes_or_goes_while_training(eager, switch):
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.speaks:
            print(end="")
        return self.b(self.norm(x).relu())

    module = build(forward)
    model = eager(module, "in-hindsight-w8a8g8")
    found = []
    for module.speaks in switch:
        F.cross_entropy(model(X), Y).backward()
        found.append(model.ranges())
    assert found[0].keys() == found[1].keys()
    assert not torch.equal(found[0]["b/input"], found[1]["b/input"])


def test_a_layer_on_both_sides_keeps_both_numbers_when_captured_again():
    names = ModelNames(nn.Linear(2, 2))
    parts = [dataclasses.replace(PLAIN, key=("file", function, 1, "")) for function in "ab"]
    for _ in range(2):
        assert [names.frame(part, lambda: None).claim("layer") for part in parts] == [1, 2]


def test_code_of_both_modes_has_one_name():
    names = ModelNames(nn.Linear(2, 2))
    parts = [dataclasses.replace(PLAIN, key=("file", function, 1, "")) for function in "abc"]
    frames = [[names.frame(part, lambda: None, frozen=mode) for part in parts] for mode in (False, True)]
    assert [frame.claim("layer") for frame in frames[0][:2]] == [1, 2]
    assert frames[1][1].claim("layer") == 2  # evaluation may run the second of two parts alone
    assert frames[1][2].claim("layer") == 1  # a part that training does not have takes the first free number
    assert frames[1][0].claim("layer") == 3  # which is then taken
    names.release(("file", "b", 1), frozen=True)
    assert [frame.claim("layer") for frame in frames[0]] == [1, 2, 3]
