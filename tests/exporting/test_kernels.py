"""Operators between two quantizers: onnxruntime's kernels on codes give the codes of floats, and verify_onnx looks."""

import collections

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.exporting.passes.separate_quantizers import SeparateQuantizers
from qcompiler.exporting.passes.shield_float_kernels import ShieldFloatKernels
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

#: operators on two activations of 8 channels and 8×8 places
OPERATORS = {
    "softmax of channels": lambda x, y: x.softmax(1),
    "softmax of rows": lambda x, y: (x.relu() * 1.0).softmax(-1),
    "softmax of a view": lambda x, y: x.flatten(2).softmax(-1).view_as(x),
    "log softmax": lambda x, y: x.log_softmax(1),
    "sigmoid": lambda x, y: x.sigmoid(),
    "leaky relu": lambda x, y: F.leaky_relu(x, 0.1),
    "hardswish": lambda x, y: F.hardswish(x),
    "gelu": lambda x, y: F.gelu(x),
    "tanh": lambda x, y: x.tanh(),
    "relu": lambda x, y: x.relu(),
    "relu6": lambda x, y: F.relu6(x),
    "concat": lambda x, y: torch.cat([x[:, :3], y[:, :3], x[:, 6:] * 0.5], 1),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "split": lambda x, y: torch.cat(x.chunk(2, 1)[::-1], 1),
    "nearest": lambda x, y: F.interpolate(x, scale_factor=2),
    "mean": lambda x, y: F.adaptive_avg_pool2d(x, 1),
    "mean of rows": lambda x, y: x.mean(-1, keepdim=True),
    "average pool": lambda x, y: F.avg_pool2d(x, 3, 2, 1),
    "cut average pool": lambda x, y: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "cut, padded average pool": lambda x, y: F.avg_pool2d(x.relu(), 3, 2, 1, ceil_mode=True).relu(),
    "max pool": lambda x, y: F.max_pool2d(x, 2),
    "product": lambda x, y: x * y,
    "sum": lambda x, y: x + y,
    "argmax": lambda x, y: x * (y.argmax(1, keepdim=True) / 7),
    "times 1": lambda x, y: x * 1.0,
    "plus 0": lambda x, y: x + 0,
    "divided by 1": lambda x, y: x / 1,
    "one part": lambda x, y: torch.cat([x], 1),
    "relu times 1": lambda x, y: x.relu() * 1.0,
    "transposed twice": lambda x, y: x.transpose(1, 2).relu().transpose(1, 2),
    "views": lambda x, y: x.flatten(1).view(-1, 8, 8, 8),
}
HINDSIGHT = "nearest:pass:hindsight(0.9,0.01)"


def recipe_of(form, block="tensor"):
    """A recipe with this format for activations and outputs."""
    spec = parse_spec(f"{form}:real:{block}:{HINDSIGHT}")
    weight = Rule(role=Role.WEIGHT, spec=parse_spec("int7:real:i*s*:nearest:pass"))
    rules = (weight, Rule(role=Role.ACTIVATION, spec=spec), Rule(role=Role.OUTPUT, spec=spec))
    return Recipe(name=form, rules=rules, integer_biases=True)


class Branches(nn.Module):
    """Operators side by side, each between convolutions of its own."""

    def __init__(self, operators):
        super().__init__()
        self.operators = list(operators)
        self.left, self.right = (nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in self.operators) for _ in range(2))
        self.last = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in self.operators)

    def forward(self, x):
        parts = zip(self.operators, self.left, self.right, self.last, strict=True)
        return [last(operator(left(x), right(x))) for operator, left, right, last in parts]


def exported(model, recipe, path, x=None):
    """(module after two steps, report)."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    for _ in range(2):
        made = qmodel(torch.randn(4, 3, 8, 8) if x is None else x)
        torch.stack(
            [one.float().square().mean() for one in (made if isinstance(made, list) else [made])]
        ).sum().backward()
    return qmodel, qcompiler.export_onnx(qmodel, path, (torch.randn(4, 3, 8, 8) if x is None else x,))


FULL = [pytest.param(name, 1, marks=pytest.mark.full) for name in ("deploy-int8", "in-hindsight-w8a8g8", "int4")]


@pytest.mark.parametrize(("recipe", "every"), [("deploy-int8", 3), *FULL])
def test_kernels_on_codes_change_no_number(recipe, every, tmp_path):
    """Codes flip beside the middle of two alone: sums of up to 72 products and 9 numbers of 255 steps, in float32."""
    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(16, 3, 8, 8)
    model = Branches([*OPERATORS.values()][::every])
    qmodel, report = exported(model, recipe_of(recipe) if recipe == "int4" else recipe, path)
    found = qcompiler.verify_onnx(qmodel, path, (x,))
    assert found.exact
    assert found.merged == ()
    assert found.close
    assert "QLinearSoftmax" not in report.integer_kernels
    rate = 2 * (72 + 9) * 255 * 2.0**-24
    share = collections.Counter()
    for site in found.sites:
        share[site.name] = (site.optimized - 4 * max(site.flipped, site.own)) / site.elements
    assert {name: one for name, one in share.items() if one > rate} == {}


def between(operator):
    """An operator between two convolutions."""
    return Branches([operator])


def test_fast_kernels_stay(tmp_path):
    """A table of 256 numbers is exact: no barrier in front of Sigmoid, nor behind the softmax of floats."""
    _, report = exported(between(OPERATORS["sigmoid"]), recipe_of("affine8"), tmp_path / "model.onnx")
    assert report.integer_kernels["QLinearSigmoid"] == 1
    assert "Neg" not in {node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
    rules = recipe_of("affine8").rules[:2]
    exported(between(OPERATORS["softmax of rows"]), Recipe(name="inputs", rules=rules), tmp_path / "model.onnx")
    assert "Neg" not in {node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}


def test_merged_quantizers_are_told(monkeypatch, tmp_path):
    """A file that shows all codes computes other numbers than the plain one; without barriers, that is told."""
    monkeypatch.setattr(SeparateQuantizers, "__call__", lambda self, subject: 0)
    path = tmp_path / "model.onnx"
    qmodel, _ = exported(between(OPERATORS["times 1"]), recipe_of("affine8"), path)
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(40, 3, 8, 8),))
    assert found.exact  # each quantizer is right by itself
    assert found.merged == ("last.0/input",)
    assert not found.close
    assert "merged by onnxruntime, with other numbers: last.0/input" in str(found)


@pytest.mark.full
def test_other_kernels_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(ShieldFloatKernels, "__call__", lambda self, subject: 0)
    path = tmp_path / "model.onnx"
    qmodel, report = exported(between(OPERATORS["softmax of channels"]), recipe_of("affine8"), path)
    note = "onnxruntime makes 1 operators QLinearSoftmax, which takes powers from a table of integers"
    assert note in report.notes
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(40, 3, 8, 8),))
    assert found.integer_kernels["QLinearSoftmax"] == 1
    assert "1 QLinearSoftmax" in str(found)
    assert sum(site.optimized for site in found.sites) > 100 > 20 + 4 * sum(site.flipped for site in found.sites)
    assert not found.close


@pytest.mark.parametrize("form", ["int4", "affine4"])
def test_a_relu_in_front_of_4_bits_stays(form, tmp_path):
    """onnxruntime takes any relu in front of 4 bits for one that the zero point implies."""
    path = tmp_path / "model.onnx"
    qmodel, _ = exported(between(lambda x, y: x.relu() * 0.5), recipe_of(form), path)
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(40, 3, 8, 8),))
    assert [site.optimized for site in found.sites] == [site.flipped for site in found.sites]
    assert found.optimized == found.plain


def test_largest_numbers_of_4_bits(tmp_path):
    """onnxruntime moves 4-bit codes over a MaxPool, for which it has no kernel of them."""
    for operator in (lambda x, y: F.max_pool2d(F.max_pool2d(x, 2), 1), lambda x, y: x.amax((2, 3), keepdim=True)):
        qmodel, _ = exported(between(operator), recipe_of("uint4"), tmp_path / "model.onnx")
        assert qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(4, 3, 8, 8),)).close


def test_several_scales_of_an_activation(tmp_path):
    """No integer kernel has several scales for its input; before, onnxruntime refused such files."""
    path, recipe = tmp_path / "model.onnx", recipe_of("affine8", "b*c2s*g*")
    operators = [lambda x, y: x.sigmoid(), lambda x, y: F.avg_pool2d(x, 2), lambda x, y: F.leaky_relu(x)]
    qmodel, report = exported(Branches(operators), recipe, path)
    assert report.exported["static"]
    assert report.integer_kernels == {}
    found = qcompiler.verify_onnx(qmodel, path, (torch.randn(40, 3, 8, 8),))
    assert found.exact
    assert found.close


@pytest.mark.parametrize("recipe", ["deploy-int8", "hyperblock-int8"])
def test_models_in_float16(recipe, tmp_path):
    """onnxruntime computes them in float32; fed the same number, each quantizer gives the same code."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)]
    path, x = tmp_path / "model.onnx", torch.randn(64, 3, 8, 8).half()
    qmodel, report = exported(nn.Sequential(*layers).half(), recipe, path, x)
    assert report.integer_kernels == {}
    found = qcompiler.verify_onnx(qmodel, path, (x,))
    assert found.exact
    assert sum(site.own for site in found.sites) > 0  # float64 beside float16, not beside itself
    assert found.optimized <= 2 * found.spread


class Scaled(nn.Module):
    """An input by keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.layer(x) * scale


def test_keyword_inputs_as_at_export(tmp_path):
    path, x, others = tmp_path / "model.onnx", torch.randn(3, 4), {"scale": torch.randn(3, 4)}
    qmodel = qcompiler.compile(Scaled(), "hyperblock-int8", backend="eager")
    qcompiler.export_onnx(qmodel, path, (x,), example_kwargs=others)
    assert qcompiler.verify_onnx(qmodel, path, (x,), example_kwargs=others).close
    assert qcompiler.verify_onnx(qmodel, path, (x,), kwargs=others).close
    with pytest.raises(qcompiler.ExportError, match="got example_kwargs and kwargs; valid: one of them"):
        qcompiler.verify_onnx(qmodel, path, (x,), example_kwargs=others, kwargs=others)


def test_nothing_is_printed(tmp_path, capfd):
    """Neither by torch's exporter nor by onnxruntime, also where an opset is refused."""
    qmodel = qcompiler.compile(nn.Linear(4, 4), "hyperblock-int8", backend="eager")
    qcompiler.export_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(3, 4),))
    with pytest.raises(qcompiler.ExportError, match="opset"):
        qcompiler.export_onnx(qmodel, tmp_path / "model.onnx", (torch.randn(3, 4),), opset=99)
    assert tuple(capfd.readouterr()) == ("", "")
