"""Graph breaks that come, go or move keep names and ends; parts that run side by side keep ranges of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler

# Dynamo looks at the .grad of its inputs, here tensors between two graphs, and hides the warning, but not from "error"
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
KEPT = "in-hindsight-w8a8g8"
X = torch.linspace(-1, 1, 48).reshape(8, 6).sin()


class Net(nn.Module):
    """Four layers and a switch of graph breaks."""

    switch = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.shared = (nn.Linear(6, 6) for _ in range(4))


class Moves(Net):
    """The break stands early or late."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.switch:
            print(end="")
        x = self.b(x).relu()
        if not self.switch:
            print(end="")
        return self.c(x)


class Comes(Net):
    """A second break behind one that stays."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        print(end="")
        x = self.b(x).relu()
        if self.switch:
            print(end="")
        return self.c(x)


def train(model: Any, *batches: Tensor) -> None:
    for batch in batches or (X,):
        model(batch).square().sum().backward()


def layers(model: qcompiler.QuantizedModule, *, training: bool = True) -> set[str]:
    return {site.name.partition("/")[0] for site in model.plan(training=training).sites}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [Moves, Comes])
@pytest.mark.parametrize("switches", [(True, False), (False, True), (True, False, True)], ids=str)
def test_names_and_ends_stay(eager, kind, switches):
    """Of the ends in int8 too: the last layer is the last one, wherever it was captured before."""
    module, ends = kind(), kind()
    expected, ended, kept = eager(kind(), "hyperblock-int4"), eager(ends, "hyperblock-int4"), eager(module, KEPT)
    train(expected)
    for module.switch in switches:
        ends.switch = module.switch
        train(kept)
        train(ended)
    assert {name.partition("/")[0] for name in kept.ranges()} == {"a", "b", "c"}
    formats = [{(site.name, site.spec.format) for site in one.plan().sites} for one in (ended, expected)]
    assert formats[0] == formats[1]
    with torch.no_grad():
        kept.eval()(X)
    assert layers(kept, training=False) == {"a", "b", "c"}
    assert not any("no range from training" in note for note in kept.plan(training=False).notes)


class Block(nn.Module):
    """Breaks the graph of whoever calls it, from time to time."""

    switch = False

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        if self.switch:
            print(end="")
        return self.down(x)


@pytest.mark.parametrize("switches", [(True, False), (False, True), (True, False, True)], ids=str)
def test_a_break_inside_of_a_block(eager, switches):
    """The function that calls the block has its layers, or the block has a graph of its own."""

    class Calls(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(block(self.a(x)))

    module, block = Calls(), Block()
    module.block = block
    model = eager(module, KEPT)
    for block.switch in switches:
        train(model)
    assert {name.partition("/")[0] for name in model.ranges()} == {"a", "block.up", "block.down", "c"}
    with torch.no_grad():
        model.eval()(X)
    assert layers(model, training=False) == {"a", "block.up", "block.down", "c"}


def live(layer: nn.Module, shared: nn.Module, x: Tensor) -> Tensor:
    """The layer is known behind the break too."""
    x = layer(x)
    print(end="")
    return shared(x) + layer(x).sin()


def dead(layer: nn.Module, shared: nn.Module, x: Tensor) -> Tensor:
    x = shared(layer(x))
    print(end="")
    return shared(x)


class Method(Net):
    def part(self, layer: nn.Module, x: Tensor) -> Tensor:
        x = layer(x)
        print(end="")
        return self.shared(x) + layer(x).sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.b, self.part(self.a, x))


class Live(Net):
    def forward(self, x: Tensor) -> Tensor:
        return live(self.b, self.shared, live(self.a, self.shared, x))


class Dead(Net):
    def forward(self, x: Tensor) -> Tensor:
        return dead(self.b, self.shared, dead(self.a, self.shared, x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Method, {"a", "a@2", "b", "b@2", "shared", "shared@2"}),
        (Live, {"a", "a@2", "b", "b@2", "shared", "shared@2"}),
        (Dead, {"a", "b", "shared", "shared@2", "shared@3"}),  # behind the break the two calls are one graph
    ],
)
def test_the_second_call_of_a_function_leaves_the_first_its_names(eager, kind, expected):
    model = eager(kind(), KEPT)
    train(model, X, X)
    assert layers(model) == expected
    assert {name.partition("/")[0] for name in model.ranges()} == expected
    with torch.no_grad():
        model.eval()(X)
    assert layers(model, training=False) == expected


class Grows(Net):
    """The function takes a layer that its rest has, and is captured again; the rest is not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.switch:
            x = self.shared(x)
        print(end="")
        return self.shared(x)


def test_a_rest_that_still_runs_keeps_its_name(eager):
    module = Grows()
    model = eager(module, KEPT)
    for module.switch in (False, True):
        train(model)
    assert layers(model) == {"a", "shared", "shared@2"}
    with torch.no_grad():
        model.eval()(X)
    assert layers(model, training=False) == {"a", "shared", "shared@2"}


class Elsewhere(Net):
    """In training another function has the layer first; evaluation does not run that function."""

    def other(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        print(end="")
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = self.other(x)
        else:
            print(end="")
        return self.shared(x)


def test_evaluation_behind_another_break_has_the_name_of_training(eager):
    model = eager(Elsewhere(), KEPT)
    train(model)
    with torch.no_grad():
        model.eval()(X)
    assert layers(model) == {"a", "shared", "shared@2"}
    assert layers(model, training=False) == {"a", "shared@2"}
