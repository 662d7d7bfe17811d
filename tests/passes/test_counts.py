"""How many quantizers a model costs: nothing counts to 3 or 6 anywhere, the numbers fall out of legality."""

import pytest
import torch
from torch import nn

from qcompiler import recipes
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import QuantPlan


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture
def counts(joint):
    """counts(recipe, model, *inputs) → quantizers (before, after) deduplication; nothing may stay in float."""

    def of(recipe, model, *inputs):
        captured = joint(model, *inputs)
        joint_pipeline(recipes.get(recipe))(captured.module)
        plan = QuantPlan.of(captured.module)
        assert plan.kept == ()
        return plan.placed, len(plan.sites)

    return of


def tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


class Calls(nn.Module):
    """forward(*inputs) = function(self, *inputs); with three linear layers at hand."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, *inputs):
        return self.function(self, *inputs)


#: name → (model, inputs, operands of all contractions, quantizers by hyperblock and tensor, by channelwise).
#: Channelwise codes fit one contraction of the two that read a tensor; hyperblocks fit both.
MODELS = {
    "linear": (nn.Linear(4, 6), (leaf(4, 4),), 6, 3, 6),
    "linear, first": (nn.Linear(4, 6), (torch.randn(4, 4),), 4, 3, 4),
    "linear, no bias": (nn.Linear(4, 6, bias=False), (leaf(4, 4),), 6, 3, 6),
    "linear of tokens": (nn.Linear(4, 6), (leaf(2, 3, 4),), 6, 3, 6),
    "convolution": (nn.Conv2d(4, 6, 2), (leaf(4, 4, 3, 3),), 6, 3, 6),
    "convolution, first": (nn.Conv2d(4, 6, 2), (torch.randn(4, 4, 3, 3),), 4, 3, 4),
    "convolution 1d": (nn.Conv1d(4, 6, 2), (leaf(4, 4, 3),), 6, 3, 6),
    "convolution 3d": (nn.Conv3d(4, 6, 2), (leaf(4, 4, 3, 3, 3),), 6, 3, 6),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (leaf(4, 4, 3, 3),), 6, 3, 6),
    # one channel a group: nothing is summed over it, so W needs no second block
    "depthwise": (nn.Conv2d(4, 4, 2, groups=4), (leaf(4, 4, 3, 3),), 6, 3, 5),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (leaf(4, 4, 3, 3),), 6, 3, 6),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2), (leaf(4, 4, 3, 3),), 6, 3, 6),
    "matmul": (Calls(lambda m, x, y: x @ y), (leaf(4, 4), leaf(4, 6)), 6, 3, 6),
    "batched matmul": (Calls(lambda m, x, y: x @ y), (leaf(2, 3, 4), leaf(2, 4, 6)), 6, 3, 6),
    "x xT": (Calls(lambda m, x: x @ x.t()), (leaf(4, 4),), 6, 2, 4),
    "xT x": (Calls(lambda m, x: x.t() @ x), (leaf(4, 4),), 6, 2, 4),
    "batched x xT": (Calls(lambda m, x: x @ x.mT), (leaf(2, 3, 4),), 6, 2, 4),
    # X once, and W and G of each
    "q, k, v": (Calls(lambda m, x: (m.q(x), m.k(x), m.v(x))), (leaf(4, 4),), 18, 7, 14),
    # W once, and X and G of each
    "tied": (tied(), (leaf(4, 4),), 12, 5, 10),
    "used twice": (Calls(lambda m, x: m.q(m.q(x).tanh())), (leaf(4, 4),), 12, 5, 10),
    "residual": (Calls(lambda m, x: m.k(m.q(x).relu() + x)), (leaf(4, 4),), 12, 6, 12),
    "through views": (
        nn.Sequential(nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)),
        (torch.randn(4, 4, 3, 3),),
        10,
        6,
        10,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "channelwise-int8"])
@pytest.mark.sample(12)
def test_quantizers(name, recipe, counts):
    model, inputs, before, hyperblock, channelwise = MODELS[name]
    assert counts(recipe, model, *inputs) == (before, hyperblock if recipe == "hyperblock-int8" else channelwise)


@pytest.mark.parametrize("name", ["linear", "linear, first", "convolution", "convolution, first", "q, k, v"])
def test_one_scale_a_tensor_costs_as_much_as_hyperblocks(name, counts):
    model, inputs, before, after, _ = MODELS[name]
    assert counts("tensor-int8", model, *inputs) == (before, after)


def test_without_rules_there_are_none(joint):
    captured = joint(nn.Linear(4, 6), leaf(4, 4))
    joint_pipeline(recipes.get("identity"))(captured.module)
    plan = QuantPlan.of(captured.module)
    assert (plan.placed, plan.sites) == (0, ())
    assert {kept.reason for kept in plan.kept} == {"no rule of the recipe matches"}


def test_each_further_layer_costs_its_three(counts):
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    assert counts("hyperblock-int8", nn.Sequential(*layers), torch.randn(4, 4, 3, 3)) == (16, 9)
    assert counts("channelwise-int8", nn.Sequential(*layers), torch.randn(4, 4, 3, 3)) == (16, 16)
