"""Biases in a file: whole numbers where a recipe asks for them, in float behind their layer where it does not."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.exporting import run
from qcompiler.passes.rules import Role, Rule
from qcompiler.runtime.spec import parse_spec

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network():
    """Convolutions with a bias, with a batch norm and with both; a linear layer."""
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 5)
    )


def trained(recipe, model=None):
    """A module after a step; biases that no unit divides."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model or network(), recipe, backend="eager")
    qmodel(X).square().sum().backward()
    for name, parameter in qmodel.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return qmodel


def written_and_verified(model, recipe, x, path, others=None):
    """(report, what the verification found on `x`, or on others) of a model after a step."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(x).sum().backward()
    report = qcompiler.export_onnx(qmodel, path, (x,))
    return report, qcompiler.verify_onnx(qmodel, path, (x if others is None else others,))


DEPLOY = qcompiler.RECIPES["deploy-int8"]
FLOAT = dataclasses.replace(DEPLOY, name="float-biases", integer_biases=False)


@pytest.fixture(scope="module", params=[DEPLOY, FLOAT], ids=lambda recipe: recipe.name)
def written(request, tmp_path_factory):
    """(module, file, report)."""
    path = tmp_path_factory.mktemp("biases") / "model.onnx"
    qmodel = trained(request.param)
    return qmodel, path, qcompiler.export_onnx(qmodel, path, (X,))


def test_integer_kernels_give_the_numbers_of_eval(written):
    """0.5 % of codes may lie beside the middle of two; a rounded bias of ours would move 20 times as many."""
    qmodel, path, _ = written
    found = qcompiler.verify_onnx(qmodel, path, (X,))
    assert found.exact
    flipped, codes = (sum(getattr(site, name) for site in found.sites) for name in ("optimized", "elements"))
    assert flipped / codes < 0.005
    assert found.optimized < 0.02  # a flip, of 1 in 255, in front of the last layer


def test_whole_biases_are_part_of_their_layer_and_others_stand_behind_it(written):
    qmodel, path, report = written
    whole = qmodel.recipe.integer_biases
    assert ("QLinearConv" in report.integer_kernels) == whole
    differences = [node for node in onnx.load(str(path)).graph.node if node.op_type == "Sub"]
    assert len(differences) == (0 if whole else 5)
    assert [note for note in report.notes if "biases" in note] == (
        []
        if whole
        else [
            "added in float behind 5 layers, so that no kernel rounds them: the biases of 0/Conv, 3/Conv, "
            "5/Conv …; the recipe does not ask for integer_biases"
        ]
    )


def test_onnxruntime_takes_our_whole_numbers(tmp_path):
    """The int32 biases of the optimized graph, times their units, are those of the file, up to 1/64 unit."""
    qmodel, path, kept = trained(DEPLOY), tmp_path / "model.onnx", tmp_path / "kept.onnx"
    qcompiler.export_onnx(qmodel, path, (X,))
    run.open_session(path, keep=kept)
    graph = onnx.load(str(kept)).graph
    held = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    given = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
    layers = [node for node in graph.node if node.op_type == "QLinearConv"]
    assert len(layers) == 3
    for node in layers:
        unit = held[node.input[1]].astype(np.float64) * held[node.input[4]]
        counts = held[node.input[8]]
        assert counts.dtype == np.int32
        alike = [one for one in given.values() if one.shape == counts.shape]
        assert any(np.allclose(counts * unit, one, rtol=2.0**-21, atol=unit.max() / 64) for one in alike)


def test_a_channel_that_a_norm_turns_off(tmp_path):
    """The factor 0 has no unit: the codes stay as trained, the layer adds in float, and the report says so."""
    model = network()
    qmodel = trained(DEPLOY, model)
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1] = 0, 1e-12
    report = qcompiler.export_onnx(qmodel, tmp_path / "model.onnx", (X,))
    assert any(
        "the biases of 0/Conv; a batch norm there is not folded or multiplies by 0" in note for note in report.notes
    )
    found = qcompiler.verify_onnx(qmodel, tmp_path / "model.onnx", (X,))
    assert found.exact
    assert found.optimized < 0.02


class Twice(nn.Module):
    """A layer that is called twice, and a sum."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        return self.mix(self.mix(x.mean(1))).relu() + x.mean(1)


@pytest.mark.parametrize("recipe", [DEPLOY, FLOAT], ids=lambda recipe: recipe.name)
def test_a_layer_that_is_called_twice_has_two_units(recipe, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    _, found = written_and_verified(Twice(), recipe, torch.randn(8, 3, 6), path, torch.randn(64, 3, 6))
    assert found.exact
    assert found.optimized < 0.02
    assert sum(node.op_type == "Sub" for node in onnx.load(str(path)).graph.node) == (0 if recipe.integer_biases else 2)


def test_a_weight_in_blocks_has_no_unit(tmp_path):
    """Several scales along the sum: no engine adds whole numbers there, and the bias stays where it is."""
    weight = parse_spec("int8:real:i4:nearest:pass")
    recipe = dataclasses.replace(DEPLOY, name="blocks", rules=(Rule(role=Role.WEIGHT, spec=weight), *DEPLOY.rules[1:]))
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.randn(8, 8)
    report, found = written_and_verified(model, recipe, x, tmp_path / "model.onnx", torch.randn(64, 8))
    assert not any("biases" in note for note in report.notes)
    assert found.exact


class Scaled(nn.Module):
    """A product whose bias counts twice, and half of its sums."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, beta=2.0, alpha=0.5) * 1.0


class Constant(nn.Module):
    """A bias of no parameter: a constant, or a mean of the input."""

    def __init__(self, depends):
        super().__init__()
        self.weight, self.depends = nn.Parameter(torch.randn(8, 8)), depends

    def forward(self, x):
        return F.linear(x, self.weight, x.mean(0) if self.depends else torch.full((8,), 0.3)).relu()


GROUPS = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, groups=2), nn.Conv2d(6, 3, 1))


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", [DEPLOY, FLOAT], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Scaled(), torch.randn(8, 8)),
        (Constant(False), torch.randn(8, 8)),
        (Constant(True), torch.randn(8, 8)),
        (GROUPS, torch.randn(4, 3, 5, 5)),
    ],
    ids=["scaled", "constant", "of the input", "groups"],
)
def test_biases_that_no_unit_belongs_to(model, x, recipe, tmp_path):
    """The file and integer kernels add what PyTorch adds, but for a flip in front."""
    _, found = written_and_verified(model, recipe, x, tmp_path / "model.onnx")
    assert found.exact
    assert max(found.plain, found.optimized) < 0.02


def test_float_weights_between_quantizers_stay_float(tmp_path):
    """onnxruntime would round them to 8 bits, with their biases: a sum of one channel without bias, and all others."""
    affine = parse_spec("affine8:real:tensor:nearest:pass:hindsight(0.9,0.01)")
    rules = tuple(Rule(role=role, spec=affine) for role in (Role.ACTIVATION, Role.OUTPUT))
    recipe = qcompiler.Recipe(name="outputs", rules=rules)
    layers = (nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 4, 3, bias=False), nn.Conv2d(4, 1, 1, bias=False))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))
    report, found = written_and_verified(model, recipe, torch.randn(4, 8, 8, 8), tmp_path / "m.onnx")
    assert report.integer_kernels == {}
    assert report.notes == ()
    assert found.exact
    assert [(site.flipped, site.optimized) for site in found.sites] == [(0, 0)] * 5  # the input, and four layers
