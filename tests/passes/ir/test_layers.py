"""Where a layer ends, and what the quantizers of outputs behind layers read and feed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.passes.rules import ADDITION, Behind, Role, Rule
from qcompiler.runtime.spec import parse_spec

SPEC = parse_spec("int8:real:tensor:nearest:pass")
RULES = tuple(
    Rule(role=Role.OUTPUT, operator=operator, behind=Behind.LAYER, spec=SPEC) for operator in ("convolution", ADDITION)
)


class Block(nn.Module):
    """Two convolutions with batch norm, a sum, and functions that end a layer or do not."""

    def __init__(self, inner=F.relu, outer=F.relu):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.inner, self.outer = inner, outer

    def forward(self, x):
        y = self.inner(self.bn1(self.one(x)))
        y = self.bn2(self.two(y))
        return self.outer(y + x)


def lines(model, rules=RULES, *, training=True):
    """The graph as text, by the name of each node."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, qcompiler.Recipe(name="test", rules=rules), backend="eager")
    qmodel.train(training)
    qmodel(torch.randn(2, 3, 4, 4)).sum().backward()
    text = qmodel.graph_text(training=training)
    return [line.strip() for line in text.splitlines() if " = " in line], qmodel


def quantized(found):
    """site → the operator that made the tensor that it reads; without what backward turns (blocks of one sample)."""
    made = {line.partition(" :")[0].lstrip("<! %"): line.partition(" = ")[2] for line in found}
    sites = {}
    for line in found:
        if "= qcompiler.quantize(" in line and not line.startswith("<"):
            arguments = line.partition("quantize(")[2].rstrip(")").split(", ")
            sites[arguments[-1].removesuffix(".turned")] = made[arguments[0].lstrip("%")].partition("(")[0]
    return sites


@pytest.mark.parametrize("training", [True, False])
def test_behind_batch_norm_and_relu(fresh, training):
    found, _ = lines(Block(), training=training)
    assert quantized(found) == {"one/output": "aten.relu", "two/output": "getitem", "add/output": "aten.relu"}


def test_relu6_ends_a_layer_and_gelu_does_not(fresh):
    found, _ = lines(Block(inner=F.relu6, outer=F.gelu))
    assert quantized(found) == {"one/output": "aten.hardtanh", "two/output": "getitem", "add/output": "aten.add.Tensor"}


def test_a_second_reader_ends_the_layer_before_the_norm(fresh):
    class Two(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return F.relu(self[1](y)) + y

    found, _ = lines(Two(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert quantized(found)["0/output"] == "aten.convolution"


def test_sums_that_are_no_residuals(fresh):
    """A constant, a parameter, a broadcast: no sum of two activations."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(2, 3, 4, 4))

        def forward(self, x):
            y = self.conv(x) + 1
            return y * 2 + self.shift + y.mean((2, 3), keepdim=True)

    found, _ = lines(Sums())
    assert quantized(found).keys() == {"conv/output"}


def test_the_gradient_of_relu_reads_relu(fresh):
    """A small positive value rounds to code 0; its gradient passes all the same."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    qmodel = qcompiler.compile(model, qcompiler.Recipe(name="test", rules=RULES), backend="eager")
    x = torch.tensor([1000.0, 0.001, -1.0, 5.0]).reshape(1, 1, 2, 2).requires_grad_()
    y = qmodel(x)
    y.sum().backward()
    assert y.flatten()[1] == 0
    assert x.grad.flatten().tolist() == [1, 1, 0, 1]


class Rows(nn.Module):
    """Two linear layers, of which each row of a sample is one; between them a relu, behind a view or not."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x):
        return self.two(self.between(self.one(x)).relu())


@pytest.mark.parametrize(
    ("between", "made", "layout"),
    [
        (lambda y: y, "aten.relu", "bbc"),
        (lambda y: y.transpose(1, 2), "aten.addmm", "bc"),  # 4 rows of 4 channels: only the layout is another
        (lambda y: y + 1, "aten.addmm", "bc"),
    ],
)
def test_rows_that_are_split_before_a_relu(between, made, layout, fresh):
    linear = (Rule(role=Role.OUTPUT, operator="linear", behind=Behind.LAYER, spec=SPEC),)
    qmodel = qcompiler.compile(Rows(between), qcompiler.Recipe(name="test", rules=linear), backend="eager")
    qmodel(torch.randn(2, 4, 4)).sum().backward()
    found = [line.strip() for line in qmodel.graph_text().splitlines() if " = " in line]
    assert quantized(found)["one/output"] == made
    assert next(line for line in found if "quantize(" in line and "one/output" in line).split(", ")[-2] == layout


def test_additions_have_to_be_named(fresh):
    every = Rule(role=Role.OUTPUT, behind=Behind.LAYER, spec=SPEC)
    found, _ = lines(Block(), (every,))
    assert "add/output" not in quantized(found)
    with pytest.raises(ValueError, match="operator: got 'addition'; valid: convolution, linear, matmul"):
        Rule(role=Role.WEIGHT, operator=ADDITION, spec=SPEC)
    with pytest.raises(ValueError, match="behind: got 'layer' for 'weight'; valid: role output"):
        Rule(role=Role.WEIGHT, behind=Behind.LAYER, spec=SPEC)


def test_no_rule_is_called_unused(fresh):
    _, qmodel = lines(Block())
    assert qmodel.plan().notes == ()
