"""Why an export has other quantizers than training: the error names the layer, the line or the input, and the cure."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import recipes
from qcompiler.passes.rules import Role, Rule

#: what Dynamo does behind a graph break
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Recurrent(nn.Module):
    """A recurrent layer below a name of its own, and a linear layer behind."""

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.ModuleDict({"r": kind(8, 8, batch_first=True)})
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.inner["r"](x)[0])


class Broken(nn.Module):
    """A graph break between two layers; the rest of forward begins in the line of the break."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x)
        torch._dynamo.graph_break()
        return self.b(h.relu())


class Pair(nn.Module):
    """Two inputs, each with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.a(x) - 2 * self.b(y.reshape(-1, 8))


class Itself(nn.Module):
    """Gives one tensor as both inputs."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.pair(x, x)


def rows(*sizes):
    return torch.randn(*sizes, 8)


def trained(model, recipe, *args):
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    for _ in range(2):
        qmodel(*args).square().mean().backward()
    return qmodel


def refused(qmodel, path, args, match):
    with pytest.raises(qcompiler.ExportError, match=match):
        qcompiler.export_onnx(qmodel, path, args)
    assert not path.exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "deploy-int8", "in-hindsight-w8a8g8"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_layer_is_named(kind, recipe, tmp_path):
    qmodel = trained(Recurrent(kind), recipe, rows(2, 3))
    match = rf"^export: .*: inner\.r \({kind.__name__}\) is a recurrent layer, .*; valid: a model without recurrent"
    refused(qmodel, tmp_path / "m.onnx", (rows(2, 3),), match)


@pytest.mark.parametrize("recipe", ["tensor-int8", "deploy-int8"])
@pytest.mark.parametrize("free", [True, False])
def test_a_recurrent_layer_that_no_step_has_trained(free, recipe, tmp_path):
    """Without a batch it takes the number of its steps for a number, which is told first."""
    qmodel = qcompiler.compile(nn.Sequential(nn.Flatten(), nn.LSTM(8, 8)), recipe, backend="eager")
    match = "(?s)^export: .*Valid: .*dynamic_batch=False.*Beside that, " if free else "^export: .*: "
    with pytest.raises(qcompiler.ExportError, match=rf"{match}1 \(LSTM\) is a recurrent layer"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (rows(2),), dynamic_batch=free)
    assert list(tmp_path.iterdir()) == []


def test_a_recurrent_layer_that_a_rule_keeps_in_float(tmp_path):
    """What the error says to be valid is."""
    rules = tuple(Rule(spec=None, module="inner.r*", role=role) for role in (None, Role.OUTPUT))
    plain = recipes.get("deploy-int8")
    qmodel = trained(
        Recurrent(nn.GRU), dataclasses.replace(plain, name="own", rules=(*rules, *plain.rules)), rows(2, 3)
    )
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (rows(2, 3),))
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (rows(5, 3),))
    assert found.exact
    assert {site.name for site in found.sites} == {"last/input", "last/weight"}


def test_a_graph_break_is_named_with_its_line(tmp_path):
    source, first = inspect.getsourcelines(Broken.forward)
    line = first + next(i for i, text in enumerate(source) if "graph_break" in text)
    qmodel = trained(Broken(), "deploy-int8", rows(4))
    match = rf"differ in b/input; .*a graph break at \S*test_causes\.py:{line} \(Call to .*; valid: .*strict=True"
    refused(qmodel, tmp_path / "m.onnx", (rows(4),), match)
    loaded = qcompiler.compile(Broken(), "in-hindsight-w8a8g8", backend="eager")
    refused(loaded, tmp_path / "m.onnx", (rows(4),), r"no range yet for .*; train the model for a step")
    some = {
        key: one for key, one in trained(Broken(), loaded.recipe, rows(4)).state_dict().items() if "b/in" not in key
    }
    loaded.load_state_dict(some)
    refused(loaded, tmp_path / "m.onnx", (rows(4),), rf"no range yet for b/input: .*a graph break at \S*:{line} ")


@pytest.mark.parametrize("recipe", ["deploy-int8", "in-hindsight-w8a8g8"])
@pytest.mark.parametrize(("again", "reason"), [(True, "one tensor was x, y"), (False, "y was no tensor of its own")])
def test_a_tensor_that_training_gave_twice(again, reason, recipe, tmp_path):
    """One quantizer had the range of both inputs; the file would have two, whose inputs differ."""
    x = rows(4)
    qmodel, path = trained(Pair(), recipe, x, x), tmp_path / "m.onnx"
    match = rf"^export: no range yet for b/input: b/input reads the input y, and in training {reason}, .*y\.clone\(\)"
    refused(qmodel, path, (x, x if again else rows(4)), match)


def test_the_cures_of_a_tensor_given_twice(tmp_path):
    """A copy of it, or a model of one input; without kept ranges there is nothing to cure."""
    x, path = rows(4), tmp_path / "m.onnx"
    for model, recipe, args in [
        (Pair(), "deploy-int8", (x, x.clone())),
        (Itself(), "deploy-int8", (x,)),
        (Pair(), "hyperblock-int8", (x, x)),
    ]:
        qmodel = trained(model, recipe, *args)
        qcompiler.export_onnx(qmodel, path, args)
        assert qcompiler.verify_onnx(qmodel, path, tuple(rows(7) for _ in args)).exact


def test_a_tensor_given_twice_before_training(tmp_path):
    x = rows(4)
    qmodel = qcompiler.compile(Pair(), "deploy-int8", backend="eager")
    refused(qmodel, tmp_path / "m.onnx", (x, x), r"^export: no range yet for .*; train the model for a step")
