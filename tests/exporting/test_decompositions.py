"""One table of decompositions: an exported graph has the operators of the captured one, and no quantizer besides."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.passes.ir.layers import residual_sums
from qcompiler.passes.ir.views import aten

#: what holds no arithmetic: it shows where a tensor is copied, or that autograd has seen it
_SILENT = {aten.detach.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default}


class Call(nn.Module):
    """A function of the module and its input as a model."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def resized(mode, **options):
    return lambda m, x: m.b(F.interpolate(m.a(x).relu(), mode=mode, **options))


def convolutions(function):
    return Call(function, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 4, 3, padding=1))


def layers(function):
    return Call(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


IMAGES = {
    "nearest": resized("nearest", scale_factor=2.3),
    "nearest exact": resized("nearest-exact", scale_factor=1.7),
    "bilinear": resized("bilinear", scale_factor=2),
    "bilinear to a size": resized("bilinear", size=(7, 11)),
    "bilinear, corners": resized("bilinear", scale_factor=1.7, align_corners=True),
    "bilinear, smoothed": resized("bilinear", scale_factor=0.5, antialias=True),
    "bicubic": resized("bicubic", scale_factor=1.7),
    "area": resized("area", size=(4, 5)),
    "dropout": lambda m, x: m.b(F.dropout(m.a(x), 0.5, m.training)),
    "group norm": lambda m, x: m.b(F.group_norm(m.a(x), 2)),
    "instance norm": lambda m, x: m.b(F.instance_norm(m.a(x))),
    "pixel shuffle": lambda m, x: m.b(F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2), 2)),
    "fold": lambda m, x: m.b(F.fold(F.unfold(m.a(x), 3, padding=1), (6, 6), 3, padding=1)),
}
ROWS = {
    "hardshrink": lambda m, x: m.b(F.hardshrink(m.a(x))),
    "softshrink": lambda m, x: m.b(F.softshrink(m.a(x))),
    "einsum": lambda m, x: m.b(torch.einsum("bi,bj->bij", m.a(x), x).flatten(1)[:, ::8]),
    "glu": lambda m, x: m.b(F.glu(m.a(x).repeat(1, 2))),
    "cosine": lambda m, x: F.cosine_similarity(m.a(x), m.b(x)),
    "tensor split": lambda m, x: m.b(torch.cat(torch.tensor_split(m.a(x), 3, 1)[::-1], 1)),
    "log-add-exp": lambda m, x: m.b(torch.logaddexp(m.a(x), x)),
    "index": lambda m, x: m.b(m.a(x)[:, :, None][..., 0][:]),
    "std": lambda m, x: m.b(m.a(x) / x.std(1, keepdim=True)),
}


def operators(graph):
    called = [node.target for node in graph.nodes if node.op == "call_function" and node.target not in _SILENT]
    return [str(target) for target in called]


def captured(model, args):
    """The forward operators of eval mode as torch.compile sees them, without gradients and with."""
    graphs = []

    def keep(module, inputs):
        graphs.append(torch_compat.export_joint(module, inputs)[0].graph)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep)(*args)
    return operators(graphs[-1])


def exported(model, args):
    with torch_compat.quiet_exporter(), torch.no_grad():
        program = torch.export.export(model, args, strict=False)
        return program.run_decompositions(torch_compat.training_decompositions()).graph


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [*IMAGES, *ROWS])
def test_an_exported_graph_has_the_operators_of_the_captured_one(name):
    images = name in IMAGES
    model = convolutions(IMAGES[name]) if images else layers(ROWS[name])
    args = (torch.randn(2, 3, 6, 6) if images else torch.randn(2, 8),)
    model.eval()
    assert operators(exported(model, args)) == captured(model, args)


def many(m, x):
    """Six sums that a model writes, in six ways, between sums inside of calls."""
    a, b = m.a(x), m.b(x)
    c = torch.add(a, b) + a.add(b)
    d = c.sin()
    d += sum([a, b])[:, :]
    return d.cos().add_(m.cell(x, a))


def test_residual_sums_are_those_that_the_model_writes():
    model = Call(many, a=nn.Linear(8, 8), b=nn.Linear(8, 8), cell=nn.GRUCell(8, 8)).eval()
    assert len(list(residual_sums(_with_inputs(model, (torch.randn(2, 8),))))) == 6
    upsampled = convolutions(resized("bilinear", scale_factor=2)).eval()
    assert not list(residual_sums(_with_inputs(upsampled, (torch.randn(2, 3, 6, 6),))))


def _with_inputs(model, args):
    """An exported graph whose inputs are described."""
    from qcompiler.passes.ir.facts import Input, InputKind
    from qcompiler.passes.ir.meta import set_fact

    graph = exported(model, args)
    for node in graph.find_nodes(op="placeholder"):
        set_fact(node, Input(InputKind.PARAMETER if node.name.startswith("p_") else InputKind.INPUT, node.name))
    return graph


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("factor", "free"), [(2.3, False), (1.5, True)])
def test_interpolation(mode, factor, free, tmp_path):
    """By 2.3 an index of nearest is off by one where 1/2.3 is rounded in other ways, as by ONNX's Resize."""
    torch.manual_seed(0)
    model = convolutions(resized(mode, scale_factor=factor))
    qmodel = qcompiler.compile(model, "deploy-int8", backend="eager")
    qmodel(torch.randn(2, 3, 34, 6)).square().sum().backward()
    shapes = {"args": ({0: "batch", 2: "height"},)} if free else None
    report = qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 3, 34, 6),), dynamic_shapes=shapes)
    assert report.trained == sum(report.exported.values()) == 5  # two weights, two inputs, the end of a layer
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(3, 3, 37 if free else 34, 6),))
    assert found.exact
    assert max(found.plain, found.spread) < 1e-6  # no index is another


def test_a_size_that_a_file_would_round_otherwise_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2.3))
    qmodel = qcompiler.compile(model, "identity", backend="eager")
    with pytest.raises(qcompiler.ExportError, match=r"1: a scale factor of 2\.3 over a free dimension"):
        qcompiler.export_onnx(
            qmodel, tmp_path / "m.onnx", (torch.randn(2, 3, 6, 6),), dynamic_shapes={"input": {2: "height"}}
        )
