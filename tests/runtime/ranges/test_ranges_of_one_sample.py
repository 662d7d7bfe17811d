"""Ranges of the past for one sample alone: its graph has other layouts, and the range is that of all samples."""

import pytest
import torch
from torch import nn

from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")

#: the guard of 1 never fires: more than all elements would have to be clipped
SPEC = "int8:fit:tensor:nearest:pass:hindsight(0.75,1)"


def recipe(activation: str = SPEC) -> Recipe:
    rules = (Rule(role=Role.ACTIVATION, spec=parse_spec(activation)), Rule(spec=parse_spec(SPEC)))
    return Recipe(name="past", rules=rules)


class Turned(nn.Module):
    """A linear layer that reads another view of its input: pooled images, or channels as rows."""

    def __init__(self, view):
        super().__init__()
        self.linear, self.view = nn.Linear(8, 3), view

    def forward(self, x):
        return self.linear(self.view(x * 2))


VIEWS = [
    (lambda x: x.mean((2, 3)).flatten(1), (8, 8, 2, 2)),
    (lambda x: x.flatten(1), (8, 8, 1, 1)),
    (lambda x: x.view(x.shape[0], -1), (8, 2, 2, 2)),
    (lambda x: x.transpose(1, 2), (8, 8, 5)),
]


@pytest.mark.parametrize(("view", "shape"), VIEWS)
def test_one_sample_has_the_range_of_all(eager, view, shape):
    """The graph of one sample has other layouts, in which its dimensions are other axes; the range is the same one."""
    model = eager(Turned(view), recipe())
    x = torch.randn(shape)
    model(x).sum().backward()
    model(torch.randn(shape) * 3).sum().backward()
    before = model.ranges()
    whole = model.eval()(x)
    for index, sample in enumerate(x.split(1)):
        torch.testing.assert_close(model(sample), whole[index : index + 1], rtol=1e-6, atol=1e-6)
    model.train()(x[:1] * 0.01).sum().backward()
    # ¾ of what was there, and ¼ of what was seen
    before, after = (ranges["linear/input"].flatten()[1] for ranges in (before, model.ranges()))
    assert after == 0.75 * before + 0.25 * (2 * view(x[:1] * 0.01)).abs().max()


def test_a_range_for_each_channel_is_that_of_one_sample_too(eager):
    spec = "int8:fit:b*s*g*:nearest:pass:hindsight(0.75,1)"
    model = eager(Turned(lambda x: x.flatten(1)), recipe(activation=spec))
    x = torch.randn(6, 8, 1, 1)
    model(x).sum().backward()
    assert model.ranges()["linear/input"].shape == (3, 8)
    whole = model.eval()(x)
    for index, sample in enumerate(x.split(1)):
        torch.testing.assert_close(model(sample), whole[index : index + 1], rtol=1e-6, atol=1e-6)
