"""What is said to be nonnegative is: by the operators, and by the values of real graphs."""

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.nn import functional as F

from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.passes.ir.signs import Signs
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.rules import Role


class Net(nn.Module):
    """A convolution, any function, and the contraction whose input is asked about."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.conv(x)))


NONNEGATIVE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(1),
    "pool of relu": lambda x: F.max_pool2d(F.relu(x), 2),
    "average of relu": lambda x: F.avg_pool2d(F.relu(x), 2),
    "sum of two": lambda x: F.relu(x) + torch.sigmoid(x),
    "number added": lambda x: F.relu(x) + 1,
    "product": lambda x: F.relu(x) * torch.sigmoid(x),
    "clamped": lambda x: x.clamp(0, 3),
    "joined": lambda x: torch.cat([F.relu(x[:, :2]), x[:, 2:].abs()], 1),
    "dropped": lambda x: F.dropout(F.relu(x), 0.5),
    "viewed": lambda x: F.relu(x).transpose(2, 3),
}
UNKNOWN = {
    "nothing": lambda x: x,
    "gelu": F.gelu,
    "pool": lambda x: F.max_pool2d(x, 2),
    "leaky relu": F.leaky_relu,
    "residual": lambda x: F.relu(x) + x,
    "number taken away": lambda x: F.relu(x) + -1,
    "difference": lambda x: F.relu(x) - torch.sigmoid(x),
    "clamped below zero": lambda x: x.clamp(-1, 3),
    "clamped above": lambda x: x.clamp(max=3),
    "scaled": lambda x: F.relu(x) * -2,
    "hardswish": F.hardswish,
    "padded": lambda x: F.pad(F.relu(x), [1, 1], value=-1.0),
}


def last_input(joint, function):
    """The captured graph, and the node that the last convolution of forward reads."""
    captured = joint(Net(function), torch.randn(2, 3, 4, 4))
    AnnotateRoles()(captured.module)
    found = [
        (n, f) for n, f in iterate_contractions(captured.module.graph) if f.module == "last" and f.gradient_of is None
    ]
    (node, fact) = found[0]
    assert fact.operands[0].role is Role.ACTIVATION
    return captured, node.args[0]


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_nonnegative(joint, arguments, name):
    captured, node = last_input(joint, NONNEGATIVE[name])
    assert Signs(captured.module.graph).is_nonnegative(node)
    inputs, tangents = arguments(captured, 1)
    interpreter = Interpreter(captured.module, garbage_collect_values=False)
    interpreter.run(*inputs, *tangents, enable_io_processing=False)
    assert interpreter.env[node].min() >= 0


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(joint, name):
    captured, node = last_input(joint, UNKNOWN[name])
    assert not Signs(captured.module.graph).is_nonnegative(node)


def test_codes_are_as_nonnegative_as_their_tensor(eager):
    """The mean of what came from relu, and was quantized for all its readers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1))
    qmodel = eager(model, "deploy-int8")
    qmodel(torch.randn(2, 3, 4, 4)).sum().backward()
    assert {site.name: str(site.spec.format) for site in qmodel.plan().sites}["3/input"] == "uint8"
