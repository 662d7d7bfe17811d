"""A residual network in hindsight, step by step against a training loop written by hand from the paper's formulas.

The loop shares nothing with the compiler: autograd functions quantize at the same places, and each keeps its own moving
average. So it holds what no single site shows: which tensors are quantized, which range each of them meets, and when
the ranges move.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.demo.nets import Block
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")

MOMENTUM, LEVELS = 0.75, 255
#: no guard, and gradients to nearest: then a run has no random bit that the loop would have to repeat
PAST = f"affine8:real:tensor:nearest:pass:hindsight({MOMENTUM},1)"
RECIPE = Recipe(
    name="nearest",
    rules=(
        Rule(role=Role.WEIGHT, spec=parse_spec("int8:real:tensor:nearest:pass")),
        *(Rule(role=role, spec=parse_spec(PAST)) for role in (Role.ACTIVATION, Role.GRADIENT, Role.OUTPUT)),
    ),
)


class Past:
    """The range of every site by name, in use and after the step."""

    def __init__(self):
        self.ends = {}
        self.after = {}

    def quantize(self, name, x):
        """The tensor on the grid of the range that was there before it."""
        low, high = x.detach().min().clamp(max=0), x.detach().max().clamp(min=0)
        old = self.ends.get(name, (low, high))
        self.after[name] = [MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(old, (low, high), strict=True)]
        step = (old[1] - old[0]) / LEVELS
        zero = torch.round(-old[0] / step)
        return (torch.clamp(torch.round(x / step) + zero, 0, LEVELS) - zero) * step

    def commit(self):
        """The step has ended."""
        self.ends = dict(self.after)


class Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantize):
        return quantize(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantize):
        ctx.quantize = quantize
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.quantize(grad), None


def symmetric(weight):
    step = weight.abs().max() / 127
    return torch.round(weight / step) * step


class ByHand:
    """The network below, its forward written out."""

    def __init__(self, model):
        self.model, self.past = model, Past()

    def site(self, name):
        return lambda x: self.past.quantize(name, x)

    def behind(self, name, y):
        """The output of a contraction: its gradient and itself are quantized."""
        return Forward.apply(Backward.apply(y, self.site(f"{name}/grad")), self.site(f"{name}/output"))

    def into(self, name, x):
        return Forward.apply(x, self.site(f"{name}/input"))

    def convolve(self, name, x):
        layer = self.model.get_submodule(name)
        weight = Forward.apply(layer.weight, symmetric)
        return self.behind(name, F.conv2d(x, weight, None, layer.stride, layer.padding))

    def block(self, name, x):
        block = self.model.get_submodule(name)
        x = self.into(f"{name}.conv1", x)  # the shortcut reads the same tensor
        hidden = self.into(f"{name}.conv2", F.relu(block.bn1(self.convolve(f"{name}.conv1", x))))
        shortcut = block.shortcut[1](self.convolve(f"{name}.shortcut.0", x))
        return F.relu(block.bn2(self.convolve(f"{name}.conv2", hidden)) + shortcut)

    def __call__(self, x):
        hidden = F.relu(self.model[1](self.convolve("0", self.into("0", x))))
        hidden = self.block("4", self.block("3", hidden)).mean((2, 3))
        fc = self.model[7]
        weight = Forward.apply(fc.weight, symmetric)
        return self.behind("7", F.linear(self.into("7", hidden), weight, fc.bias))


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Block(4, 6, 2),
        Block(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def gradients(model, call, x, labels, weight):
    """Backward of the weighted loss; the gradients of all parameters in one vector."""
    model.zero_grad()
    (weight * F.cross_entropy(call(x), labels)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_step_is_that_of_a_loop_written_by_hand(eager):
    """Inputs and losses change their size from step to step, so a range of another step would clip or coarsen."""
    model = network()
    qmodel = eager(model, RECIPE)
    by_hand = ByHand(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    clipped = 0
    for step in range(12):
        by_hand.model.load_state_dict(model.state_dict())
        x, labels = (1 + step % 3) * torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        weight = 2.0 ** (step % 4)
        own = gradients(model, qmodel, x, labels, weight)
        other = gradients(by_hand.model, by_hand, x, labels, weight)
        # both round the same numbers, but for codes whose float32 sums fall to the other side of a half
        assert (own - other).norm() <= 0.01 * other.norm(), step
        clipped += sum(old[1] < new[1] for old, new in matched(by_hand.past))
        by_hand.past.commit()
        ranges = {name: state.flatten()[:2] for name, state in qmodel.ranges().items()}
        assert ranges.keys() == by_hand.past.ends.keys()
        for name, ends in by_hand.past.ends.items():
            torch.testing.assert_close(ranges[name], torch.stack(ends), rtol=0.01, atol=1e-6, msg=f"{name}, {step}")
        optimizer.step()
    assert clipped > 50


def matched(past):
    """(range before, range after) of each site that had one."""
    return [(past.ends[name], after) for name, after in past.after.items() if name in past.ends]
