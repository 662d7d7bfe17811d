"""Nobody outside of passes/ir reads an argument of our operators by its position: one more argument would move it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import Node

import qcompiler

ROOT = Path(qcompiler.__file__).parents[1]


@pytest.fixture
def readers(monkeypatch):
    """The files of ours, but those of passes/ir, that touched the arguments of an operator of ours: a set of names."""
    found = set()
    original = Node.args

    def note(node):
        name = Path(sys._getframe(2).f_code.co_filename).resolve()
        ours = getattr(node.target, "namespace", "") == "qcompiler"
        if ours and name.is_relative_to(ROOT) and ".venv" not in name.parts and "tests" not in name.parts:
            place = str(name.relative_to(ROOT))
            if not place.startswith("passes/ir/"):
                found.add(place)

    def get(node):
        note(node)
        return original.__get__(node)

    def put(node, args):
        note(node)
        original.__set__(node, args)

    monkeypatch.setattr(Node, "args", property(get, put))
    return found


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def lose(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(recipe):
    torch.manual_seed(0)
    model = qcompiler.compile(network(), recipe, backend="eager")
    model(torch.randn(2, 2, 6, 6)).sum().backward()
    return model


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["hyperblock-int4", "in-hindsight-w8a8g8", "lsq-w4a4", "ewgs-w4a4", "int4-hadamard"])
def test_training(recipe, readers):
    model = train(recipe)
    model.plan()
    model.eval()(torch.randn(2, 2, 6, 6))
    assert readers == set()


def test_debugger_and_search(readers):
    model = train("hyperblock-int4")
    with qcompiler.debug(model):
        model(torch.randn(2, 2, 6, 6)).sum().backward()
    qcompiler.explain(model)
    model.stages()
    batches = [(torch.randn(2, 2, 6, 6), torch.tensor([0, 1]))]
    qcompiler.search(network(), batches, budget=6.0, loss=lose, batches=1, quiet=True)
    assert readers == set()


def test_export(readers, tmp_path):
    qcompiler.export_onnx(train("deploy-int8"), tmp_path / "model.onnx", (torch.randn(2, 2, 6, 6),))
    assert readers == set()


def test_the_check_can_fail(readers):
    """A read from a file of the project outside of passes/ir is found."""
    graph = torch.fx.Graph()
    tensor = graph.placeholder("x")
    node = graph.call_function(torch.ops.qcompiler.rotate.default, (tensor, 0, 4))
    source = compile("node.args[0]", str(ROOT / "qcompiler" / "compiler" / "lower.py"), "exec")
    exec(source, {"node": node})
    assert readers == {"qcompiler/compiler/lower.py"}
