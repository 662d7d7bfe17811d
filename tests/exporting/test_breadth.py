"""Export of what real models hold: transposed convolutions, rotations, expanded parameters, other opsets."""

import dataclasses

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


def exported(recipe, model, inputs, path, **options):
    """(module, report, verification on another batch) of a model after one step."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(*inputs(4)).square().sum().backward()
    report = qcompiler.export_onnx(qmodel, path, inputs(4), **options)
    assert report.trained == sum(report.exported.values()) > 0
    return report, qcompiler.verify_onnx(qmodel, path, inputs(3))


def operators(path):
    model = onnx.load(str(path))
    return {node.op_type for node in model.graph.node}, {entry.domain: entry.version for entry in model.opset_import}


def images(batch):
    return (torch.randn(batch, 3, 4, 4),)


def up():
    """Convolutions down and up, one of them in groups, one with a batch norm behind."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    )


@pytest.mark.parametrize("recipe", ["deploy-int8", "hyperblock-int4"])
def test_transposed_convolutions(recipe, tmp_path):
    path = tmp_path / "m.onnx"
    report, found = exported(recipe, up(), images, path)
    assert found.exact
    assert "ConvTranspose" in operators(path)[0]
    assert any("behind a transposed convolution" in note for note in report.notes)


@pytest.mark.parametrize("opset", [21, 23])
def test_rotations(opset, tmp_path):
    """Rotations before the quantizers, and integers with a scale of two levels: as functions of the opset asked for."""
    path = tmp_path / "m.onnx"
    ends = (nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(2), nn.Linear(4, 16))
    model = nn.Sequential(*ends, nn.Linear(16, 32), nn.Linear(32, 4))
    _, found = exported("int4-hadamard", model, images, path, opset=opset)
    assert found.exact
    assert found.plain <= 1e-5
    kinds, versions = operators(path)
    assert {"TwoLevelScale", "MatMul"} <= kinds
    assert versions[""] == opset


def test_unsigned_codes_on_two_levels(tmp_path):
    """A scale of unsigned codes looks at what is above zero only, on two levels too."""
    recipe = Recipe(name="one", rules=(Rule(role=Role.ACTIVATION, spec=parse_spec("uint4:two-level:c4:nearest:pass")),))
    _, found = exported(recipe, nn.Linear(8, 4), lambda batch: (torch.randn(batch, 8),), tmp_path / "m.onnx")
    assert found.exact


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6()])
def test_linear_layers_on_rows_run_on_integers(relu, tmp_path):
    """(N, T, C): the relu belongs to the layer, one quantizer stands behind both, and onnxruntime makes it a QGemm."""
    linear = [nn.Linear(16, 16) for _ in range(4)]
    model = nn.Sequential(linear[0], nn.ReLU(), linear[1], relu, linear[2], nn.ReLU(), linear[3])
    path = tmp_path / "m.onnx"
    report, found = exported("deploy-int8", model, lambda batch: (torch.randn(batch, 5, 16),), path)
    assert report.exported == {"weight": 4, "static": 4, "dynamic": 0}  # the input, and three layers
    assert report.integer_kernels == {"QGemm": 3}
    assert found.exact
    assert found.optimized <= 1e-5


class Turned(nn.Module):
    """Layers on channels as rows, the views of a mixer, and on pooled images."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.back = nn.LayerNorm(6), nn.Linear(10, 10), nn.Linear(10, 10)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        y = self.back(self.mix(self.norm(x).transpose(1, 2)).relu()).transpose(1, 2)
        return self.out((x + y).mean(1, keepdim=True).flatten(1))


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["deploy-int8", "in-hindsight-w8a8g8", "mxfp8"])
@pytest.mark.parametrize("free", [True, False])
def test_layers_that_read_views(recipe, free, tmp_path):
    """Verified by one sample and by several, though the graph of one sample has other views."""
    torch.manual_seed(0)
    path, x = tmp_path / "m.onnx", torch.randn(8, 10, 6)
    qmodel = qcompiler.compile(Turned(), recipe, backend="eager")
    qmodel(x).square().sum().backward()
    report = qcompiler.export_onnx(qmodel, path, (x,), dynamic_batch=free)
    assert report.trained == sum(report.exported.values()) > 0
    assert report.exported["weight"] == 3
    for given in (x, x[:1], x[:3]) if free else (x,):
        found = qcompiler.verify_onnx(qmodel, path, (given,))
        assert found.exact
        assert max(found.plain, found.optimized) <= 1e-5


def test_a_clip_mask_of_its_own(tmp_path):
    """EWGS is of tensors alone; a batch norm that is folded makes a scale for each channel."""
    inner = (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *inner, nn.Conv2d(8, 4, 1))
    report, found = exported("ewgs-w4a4", model, images, tmp_path / "m.onnx")
    assert found.exact
    assert not any("batch norm" in note for note in report.notes)
    assert [note for note in report.notes if "biases of 2/Conv" in note] == list(report.notes)


class Expanded(nn.Module):
    """A parameter and a buffer that are expanded to the batch: they are what they are for any batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("kind", torch.zeros(1, 1, dtype=torch.int64))
        self.kinds = nn.Embedding(2, 8)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.kinds(self.kind.expand(x.shape[0], x.shape[1]))
        x = self.first(x).to(x.dtype)
        return self.second(x) + x


def test_parameters_of_any_batch(tmp_path):
    """The sums that are quantized are those of training, whose batch is a number."""
    path = tmp_path / "m.onnx"
    report, found = exported("deploy-int8", Expanded(), lambda batch: (torch.randn(batch, 5, 8),), path)
    assert found.exact
    assert {site.name for site in found.sites if "add" in site.name} == {"add/output"}
    assert report.kept == ()


class Counted(Expanded):
    """The same with len(x), which is a number for torch.export."""

    def forward(self, x):
        return self.first(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


def test_a_batch_that_the_model_fixes(tmp_path):
    qmodel = qcompiler.compile(Counted(), "identity", backend="eager")
    x = torch.randn(4, 5, 8)
    with pytest.raises(qcompiler.ExportError, match=r"len\(x\).*Valid: .*dynamic_batch=False"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,))
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,), dynamic_batch=False)


class Attention(nn.Module):
    """PyTorch takes attention with dropout apart, and fuses it without."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0).squeeze(1))


def test_attention_that_training_took_apart(tmp_path):
    def inputs(batch):
        return (torch.randn(batch, 5, 8),)

    with pytest.raises(qcompiler.ExportError, match=r"no range yet for out/input; .*sdpa_kernel\(SDPBackend.MATH\)"):
        exported("in-hindsight-w8a8g8", Attention(), inputs, tmp_path / "m.onnx")
    with sdpa_kernel(SDPBackend.MATH):
        report, found = exported("in-hindsight-w8a8g8", Attention(), inputs, tmp_path / "m.onnx")
    assert found.exact
    assert report.kept == ()


def test_eval_mode_with_other_quantizers(tmp_path, monkeypatch):
    """The names in the file are those of the captured eval graph, not only those of the exported one."""
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "tensor-int8", backend="eager")
    plan = type(qmodel).plan

    def one_less(self, **options):
        whole = plan(self, **options)
        return dataclasses.replace(whole, sites=whole.sites[1:])

    monkeypatch.setattr(type(qmodel), "plan", one_less)
    with pytest.raises(qcompiler.ExportError, match="differ in 0/"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert list(tmp_path.iterdir()) == []
