"""Export to ONNX: one quantizer for each trained one, the same codes, and no file where anything fails."""

import builtins
import importlib.metadata
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.exporting import build, run
from qcompiler.passes.rules import Role, Rule, Sign
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

#: recipe → how its activations are quantized in the file
RECIPES = {
    "in-hindsight-w8a8g8": "static",
    "lsq-w4a4": "static",
    "hyperblock-int4": "dynamic",
    "mxfp8": "dynamic",
    "nvfp4": "dynamic",
}


class Net(nn.Module):
    """Convolutions with batch norm, a residual sum, channels that no block divides, and a linear layer of tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.mix = nn.Linear(16, 16)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.bn2(self.inner(x)) + x)
        x = F.relu(self.mix(x.flatten(2)))
        return self.fc(x.mean(2))


def trained(recipe, model=None, steps=2):
    """A model after a few steps; a batch norm with a factor below zero."""
    torch.manual_seed(0)
    model = model or Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    for _ in range(steps):
        qmodel(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return qmodel


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """(module, file, report) of `deploy-int8`."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    qmodel = trained("deploy-int8")
    return qmodel, path, qcompiler.export_onnx(qmodel, path, (torch.randn(4, 3, 4, 4),))


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_codes(recipe, tmp_path):
    qmodel, path = trained(recipe), tmp_path / "model.onnx"
    report = qcompiler.export_onnx(qmodel, path, (torch.randn(1, 3, 4, 4),))
    qmodel.eval()
    with torch.no_grad():
        qmodel(torch.randn(3, 3, 4, 4))
    plan = qmodel.plan(training=False)
    assert report.trained == sum(report.exported.values()) == len(plan.sites)
    assert set(run.read_sites(path)) == {site.name for site in plan.sites}
    assert report.exported["static" if RECIPES[recipe] == "dynamic" else "dynamic"] == 0
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(17, 3, 4, 4),))
    assert found.exact
    assert found.plain <= 1e-5
    onnx.checker.check_model(str(path), full_check=True)


def test_deployment_runs_on_integers(deployed):
    _, _, report = deployed
    assert report.integer_kernels["QLinearConv"] == 2
    assert report.integer_kernels["QLinearAdd"] == 1
    assert report.exported["dynamic"] == 0
    assert report.notes == ()


def test_deployment_has_the_same_codes(deployed):
    qmodel, path, _ = deployed
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(6, 3, 4, 4),))
    assert found.exact
    names = [site.name for site in found.sites]
    assert {"add/output", "conv/output", "inner/output", "mix/weight", "fc/weight"} <= set(names)
    assert any(one["negated"] for one in run.read_sites(path).values())


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_any_batch_through_one_file(deployed, batch):
    qmodel, path, _ = deployed
    x = torch.randn(batch, 3, 4, 4)
    (expected,) = run.run_reference(qmodel, (x,), {})
    (found,) = run.run_file(path, (x,), {}, optimize=False)
    assert found.shape == (batch, 5)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_batch_norm_as_it_is(deployed, tmp_path):
    """Not folded it is a node of its own; the codes are the same."""
    qmodel, folded, _ = deployed
    plain = tmp_path / "model.onnx"
    qcompiler.export_onnx(qmodel, plain, (torch.randn(4, 3, 4, 4),), fold_batch_norm=False)
    counts = [
        sum(n.op_type == "BatchNormalization" for n in onnx.load(str(path)).graph.node) for path in (folded, plain)
    ]
    assert counts == [0, 2]
    assert qcompiler.verify_onnx(qmodel, plain, (torch.randn(5, 3, 4, 4),)).exact


def test_what_the_file_says(deployed):
    qmodel, path, report = deployed
    model = onnx.load(str(path))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert qcompiler.Recipe.from_yaml(metadata[build.RECIPE]) == qmodel.recipe
    assert json.loads(metadata[build.VERSIONS])["torch"] == importlib.metadata.version("torch")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"conv/Conv", "inner/Conv", "conv/output/QuantizeLinear"} <= set(names)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= known
    assert "QLinearConv" in str(report)
    assert str(len(report.exported)) not in ("", "0")


def test_weights_are_integers(deployed):
    """No float initializer is as large as a weight."""
    _, path, _ = deployed
    model = onnx.load(str(path))
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims, dtype=int) for tensor in floats) <= 16


# --------------------------------------------------------------------------------------------------- what fails


def refused(match, *args, **kwargs):
    with pytest.raises(qcompiler.ExportError, match=match):
        qcompiler.export_onnx(*args, **kwargs)


def test_a_model_never_called(tmp_path):
    path = tmp_path / "model.onnx"
    qmodel = qcompiler.compile(Net(), "deploy-int8", backend="eager")
    refused("no range yet for .*/output.* train the model", qmodel, path, (torch.randn(2, 3, 4, 4),))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path):
    qmodel = qcompiler.compile(Net(), "identity", backend="eager")
    x = torch.randn(2, 3, 4, 4)
    refused("got Net; valid: what qcompiler.compile returned", qmodel._model, tmp_path / "m.onnx", (x,))
    refused("inputs: got Tensor; valid: a tuple", qmodel, tmp_path / "m.onnx", x)
    for opset in (20, 99, 2**70, "21", 21.0, True, None):
        said = rf"opset: got {opset!r}; valid: whole numbers from 21, .* to 2[1-9],"
        refused(said, qmodel, tmp_path / "m.onnx", (x,), opset=opset)
    refused("inputs: too many", qmodel, tmp_path / "m.onnx", (x, x))
    refused(r"does not run on the inputs x \(int\)", qmodel, tmp_path / "m.onnx", (3,))


def test_random_rounding_is_refused(tmp_path):
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "gupta-fixed16", backend="eager")
    refused("0/input.* round stochastically", qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4:real:c2:nearest:pass:sawb", "in c2 blocks .* takes each sample whole"),
        ("int4:fit:tensor:nearest:pass:sawb", "in integers of scale real"),
        ("int8:real:tensor:nearest:pass:percentile(99)", "sums or sorts"),
    ],
)
def test_ranges_that_sum_are_refused(text, reason, tmp_path):
    """Means of whole samples are float64, and the same in every order; others are not, and nothing is sorted."""
    recipe = Recipe(name="sums", rules=(Rule(role=Role.ACTIVATION, spec=parse_spec(text)),))
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), recipe, backend="eager")
    refused(f"0/input: the range .*{reason}", qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))


@pytest.mark.parametrize("batch", [2, 5])
def test_ranges_of_sums_of_whole_samples(batch, tmp_path):
    """Means are float64 on both sides: the same scale to the bit."""
    qmodel = qcompiler.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), "luq", backend="eager")
    x = torch.randn(batch, 3, 9, 9)
    assert qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,)).exported["dynamic"] == 2
    assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(40, 3, 9, 9),)).exact


def test_a_scale_of_one_has_no_blocks(tmp_path):
    """Tokens of a sample lie in blocks along several axes, all of the scale 1."""
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "hfp8", backend="eager")
    x = torch.randn(2, 3, 4)
    qmodel(x).sum().backward()
    assert qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,)).exported["static"] > 0
    assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(5, 3, 4),)).exact


class Apart(nn.Module):
    """Takes the rows that are positive: how many there are is not known before."""

    def forward(self, x):
        return x[x.sum(1) > 0].tolist()


class Special(nn.Module):
    """An operator without a form in ONNX."""

    def forward(self, x):
        return torch.special.airy_ai(x)


@pytest.mark.parametrize(("model", "match"), [(Apart(), "cannot be traced"), (Special(), "airy_ai")])
def test_models_without_a_form(model, match, tmp_path):
    qmodel = qcompiler.compile(model, "identity", backend="eager")
    refused(match, qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("range_", ["fixed(0,1)", "fixed(-1,1)"])
def test_ranges_that_are_fixed_have_no_blocks(range_, tmp_path):
    """A product of two activations, whose blocks span a sample and a head, under a range of two numbers."""
    spec = parse_spec(f"affine8:real:tensor:nearest:pass:{range_}")
    recipe = Recipe(name="fixed", rules=(Rule(role=Role.ACTIVATION, spec=spec),))

    class Product(nn.Module):
        def forward(self, x):
            return x @ x.transpose(-1, -2)

    qmodel = qcompiler.compile(Product(), recipe, backend="eager")
    assert qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.rand(2, 3, 4, 5),)).exported["static"] == 1
    assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(5, 3, 4, 5),)).exact


def test_relu6_in_front_of_four_bits(tmp_path):
    """onnxruntime refuses a Clip there; its optimizations are on in the comparison of the export."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardtanh(-1, 1), nn.Conv2d(4, 2, 1))
    rules = tuple(
        Rule(role=role, sign=sign, spec=parse_spec(f"{form}:real:tensor:nearest:pass:hindsight"))
        for role, sign, form in (
            (Role.WEIGHT, None, "int4"), (Role.ACTIVATION, Sign.NONNEGATIVE, "uint4"), (Role.ACTIVATION, None, "int4"),
        )
    )  # fmt: skip
    qmodel = qcompiler.compile(model, Recipe(name="four", rules=rules), backend="eager")
    x = torch.randn(4, 3, 6, 6)
    qmodel(x).sum().backward()
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,))
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(20, 3, 6, 6),))
    assert found.exact
    assert found.optimized < 0.1  # a flip of 1 in 15 in front of the last layer


def test_an_export_after_a_call_with_gradients(tmp_path):
    """Eval mode then has a backward half, whose quantizers are none of the file's."""
    qmodel = qcompiler.compile(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "deploy-int8", backend="eager"
    )
    x = torch.randn(8, 4)
    qmodel(x).sum().backward()
    for _ in range(2):
        report = qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,))
        qmodel.eval()(x).sum().backward()
    assert sum(report.exported.values()) == report.trained > 0


@pytest.mark.parametrize("given", [5, len])
def test_examples_that_are_none(given, tmp_path):
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "current-w8a8g8", backend="eager")
    with pytest.raises(qcompiler.ExportError, match=r"calibration: got (int|builtin_function.*); valid: an iterable"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),), calibration=given)


def test_batches_of_a_loader_are_examples(tmp_path):
    """They are lists."""
    x = torch.arange(32.0).reshape(8, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "current-w8a8g8", backend="eager")
    report = qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,), calibration=loader)
    assert report.calibrated["0/input"] == (0, 31)


def test_packages_that_are_missing(tmp_path, monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("qcompiler") and args and args[2] and "build" in args[2]:
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return original(name, *args, **kwargs)

    original = builtins.__import__
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "identity", backend="eager")
    monkeypatch.setattr(builtins, "__import__", without)
    refused(
        r"onnx is not installed; pip install 'qcompiler\[onnx\]'", qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),)
    )


def test_verification_sees_another_weight(deployed):
    """The check can fail: one weight more, and its codes differ."""
    qmodel, path, _ = deployed
    with torch.no_grad():
        qmodel.inner.weight[0, 0, 0, 0] += 1
    try:
        found = qcompiler.verify_onnx(qmodel, path, (torch.randn(2, 3, 4, 4),))
    finally:
        with torch.no_grad():
            qmodel.inner.weight[0, 0, 0, 0] -= 1
    assert [site.name for site in found.sites if site.wrong] == ["inner/weight"]
    assert "inner/weight" in str(found)


def test_verification_refuses_other_files(deployed, tmp_path):
    qmodel, path, _ = deployed
    other = qcompiler.compile(Net(), "identity", backend="eager")
    with pytest.raises(qcompiler.ExportError, match="other quantizers"):
        qcompiler.verify_onnx(other, path, (torch.randn(2, 3, 4, 4),))
    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    with pytest.raises(qcompiler.ExportError, match="not written by export_onnx"):
        qcompiler.verify_onnx(qmodel, tmp_path / "bare.onnx", (torch.randn(2, 3, 4, 4),))
