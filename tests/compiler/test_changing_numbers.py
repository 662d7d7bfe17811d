"""Ints and floats of Python that change from call to call are inputs of a graph, not constants of a new one."""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def count(self, x):
    self.calls += 1
    return self.first(x)


def count_and_use(self, x):
    self.calls += 1
    if self.calls % 3 == 0:
        x = 2 * x
    return self.first(x) * self.calls + self.calls / 2


def anneal(self, x):
    self.heat *= 0.97
    return F.linear(x, self.first.weight * self.heat) / self.heat + (1 - self.heat)


def temperature(self, x):
    self.heat *= 0.97
    return torch.softmax(self.first(x) / self.heat, -1).clamp(min=self.heat / 10)


def normalize(self, x):
    largest = x.abs().max().item()
    return self.first(x / largest) * largest


def two_items(self, x):
    scale, number = float(x.abs().max()), int((x > 0).sum())
    return self.first(x) * scale * number + number / 3


MODELS = [count, count_and_use, anneal, temperature, normalize, two_items]


def build(models, forward):
    model = models.Function(forward, first=nn.Linear(4, 4))
    model.calls, model.heat = 0, 1.0
    return model


@pytest.mark.filterwarnings("ignore:Graph break from")
@pytest.mark.parametrize("forward", MODELS, ids=lambda f: f.__name__)
def test_as_in_eager_and_few_captures(models, eager, monkeypatch, forward):
    """Twenty values, and at most eight captures of a function; bit by bit."""
    monkeypatch.setattr(sys.modules["qcompiler.session"], "CAPTURES", 8)
    model = build(models, forward)
    twin = copy.deepcopy(model)
    compiled = eager(twin)
    for _ in range(20):
        x = torch.randn(3, 4)
        expected, found = model(x), compiled(x)
        assert torch.equal(expected, found)
        model.zero_grad()
        twin.zero_grad()
        expected.sin().sum().backward()
        found.sin().sum().backward()
        assert torch.equal(model.first.weight.grad, twin.first.weight.grad)
        assert (twin.calls, twin.heat) == (model.calls, model.heat)
        assert (type(twin.calls), type(twin.heat)) == (int, float)


def test_a_weight_times_a_number_is_a_weight(models, eager):
    compiled = eager(build(models, anneal), "hyperblock-int8")
    for _ in range(3):
        compiled(torch.randn(3, 4)).sum().backward()
    assert {site.name: site.role for site in compiled.plan().sites}["(root)/weight"] is qcompiler.Role.WEIGHT


def test_a_number_that_is_a_size_is_a_constant(models, eager):
    model = models.Function(lambda self, x, size: self.first(x[:, :size]).sum(0), first=nn.Linear(2, 4))
    compiled, x = eager(model), torch.randn(3, 2)
    model.first.weight.requires_grad_(False)
    padded = torch.cat([x, x], 1)
    assert torch.equal(compiled(padded, 2), model(padded, 2))


def test_sizes_are_constants(models, eager):
    """Tensors of other shapes are captured anew, without symbols in their shapes."""
    compiled = eager(models.mlp(), "hyperblock-int8")
    for size in (3, 5, 7):
        compiled(torch.randn(size, 12)).sum().backward()
        assert {type(n) for site in compiled.plan().sites for n in site.shape} == {int}


def remember(self, x):
    y = self.first(x)
    self.seen.append(y.detach())
    return y


@pytest.mark.full
def test_a_list_that_grows(models, eager, caplog):
    """The layers are captured alone after a while, with the ranges that they had."""
    model = build(models, remember)
    model.seen = []
    compiled, x = eager(model, "in-hindsight-w8a8g8"), torch.randn(3, 4)
    for _ in range(70):
        y = compiled(x)
        y.sum().backward()
    assert len(model.seen) == 70
    assert not torch.equal(y, model(x))
    assert {name.partition("/")[0] for name in compiled.ranges()} == {"first"}
    assert {site.name.partition("/")[0] for site in compiled.plan().sites} == {"first"}
    notes = [note for note in compiled.plan().notes if "is captured in parts" in note]
    assert notes
    assert all("len(self.seen) == " in note for note in notes)
    assert "is captured in parts" in caplog.text


def test_the_error_names_the_value_and_its_line(models, eager, monkeypatch):
    monkeypatch.setattr(sys.modules["qcompiler.session"], "CAPTURES", 3)
    model = build(models, remember)
    model.seen = []
    compiled = eager(model)
    for _ in range(3):
        compiled(torch.randn(3, 4))
    found = r"^more than 3 captures: .*; the latest differs in: .*self\.seen.*test_changing_numbers.py:\d+"
    with pytest.raises(qcompiler.CompileError, match=found):
        compiled(torch.randn(3, 4))


def test_infinite_and_not_a_number(models, eager):
    model = models.Function(lambda self, x, scale: self.first(x) * scale, first=nn.Linear(4, 4))
    compiled, x = eager(model), torch.randn(3, 4)
    for scale in (1.0, 2.0, math.inf, math.nan, 3.0):
        assert torch.equal(compiled(x, scale), model(x, scale)) or math.isnan(scale)
