"""Layers that torch's exporter refuses or gets wrong: cut windows, weights made of others, views of weights, bounds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import qcompiler


class Call(nn.Module):
    """A function of the module and its input as a model."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part) * 0.3) if isinstance(part, tuple) else part)

    def forward(self, *args):
        return self.function(self, *args)


def checked(recipe, model, inputs, path, **options):
    """The report of a model after two steps, compared with PyTorch on another batch."""
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    for _ in range(2):
        qmodel(*inputs(4)).square().mean().backward()
    report = qcompiler.export_onnx(qmodel, path, inputs(4), **options)
    found = qcompiler.verify_onnx(qmodel, path, inputs(17))
    assert found.exact
    assert found.plain <= 2 * max(found.spread, 1e-6)
    assert report.trained == sum(report.exported.values()) == len(found.sites)
    return report, qmodel


def images(size=9, channels=3):
    return lambda batch: (torch.randn(batch, channels, size, size),)


def vectors(batch):
    return (torch.randn(batch, 8),)


POOLS = {
    "window behind the tensor": nn.AvgPool2d(4, 4, 2, ceil_mode=True),
    "stride above the window": nn.AvgPool2d(2, 3, ceil_mode=True),
    "cut window": nn.AvgPool2d(4, 3, 1, ceil_mode=True),
    "cut window, one side": nn.AvgPool2d((4, 1), (3, 1), (1, 0), ceil_mode=True),
    "padding not counted": nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "divisor, cut window": nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False, divisor_override=5),
    "maximum behind the tensor": nn.MaxPool2d(4, 4, 2, ceil_mode=True),
    "maximum, dilated": nn.MaxPool2d(2, 4, dilation=2, ceil_mode=True),
    "power": nn.LPPool2d(2, 4, 3, ceil_mode=True),
    "adaptive": nn.AdaptiveAvgPool2d((4, 5)),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), POOLS[name], nn.Conv2d(8, 4, 1))
    checked("deploy-int8" if name == "cut window" else "identity", model, images(), tmp_path / "m.onnx")


@pytest.mark.parametrize(("dims", "size"), [(1, 9), (3, 8)])
def test_pools_of_other_dimensions(dims, size, tmp_path):
    layer, pool = ((nn.Conv1d, nn.AvgPool1d), None, (nn.Conv3d, nn.AvgPool3d))[dims - 1]
    model = nn.Sequential(layer(3, 4, 1), pool(4, 3, 1, ceil_mode=True), layer(4, 2, 1))
    checked("identity", model, lambda batch: (torch.randn(batch, 3, *[size] * dims),), tmp_path / "m.onnx")


@pytest.mark.parametrize("pool", [nn.AvgPool2d(4, 3, 1, ceil_mode=True), nn.MaxPool2d(2, 3, ceil_mode=True)])
def test_windows_that_a_free_dimension_decides_are_refused(pool, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool)
    with pytest.raises(qcompiler.ExportError, match=r"^export: 1.*: ceil_mode over a free dimension"):
        checked("identity", model, images(), tmp_path / "m.onnx", dynamic_shapes={"input": {2: Dim("height", min=4)}})
    assert not (tmp_path / "m.onnx").exists()


def test_windows_that_no_dimension_decides_are_not(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    checked("identity", model, images(10), tmp_path / "m.onnx", dynamic_shapes=shapes)


def test_bilinear_layers(tmp_path):
    model = Call(
        lambda m, x, y: m.o(m.b(m.i(x), y).relu()), i=nn.Linear(8, 8), b=nn.Bilinear(8, 6, 5), o=nn.Linear(5, 3)
    )
    checked("deploy-int8", model, lambda batch: (torch.randn(batch, 8), torch.randn(batch, 6)), tmp_path / "m.onnx")


def test_an_operator_without_a_form_is_named_with_its_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(2))
    with pytest.raises(
        qcompiler.ExportError, match=r"^export: 1: aten\.adaptive_max_pool2d\.default has no form in ONNX"
    ):
        checked("identity", model, images(), tmp_path / "m.onnx")


#: weights that are computed of others: how, of what, and how many quantizers are part of another's codes
MADE = {
    "low rank": (lambda m, x: m.o(F.linear(x, m.b @ m.a).relu()), {"a": (3, 8), "b": (8, 3)}, 2),
    "LoRA": (lambda m, x: m.o(F.linear(x, m.w + m.b @ m.a * 2).relu()), {"w": (8, 8), "a": (2, 8), "b": (8, 2)}, 2),
    "three": (lambda m, x: m.o(F.linear(x, m.b @ m.c @ m.a).relu()), {"a": (3, 8), "c": (3, 3), "b": (8, 3)}, 4),
    "Kronecker": (lambda m, x: m.o(F.linear(x, torch.kron(m.a, m.b)).relu()), {"a": (2, 4), "b": (4, 2)}, 0),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("low rank", "hyperblock-int4"),
        ("LoRA", "deploy-int8"),
        ("three", "hyperblock-int4"),
        ("Kronecker", "deploy-int8"),
    ],
)
def test_weights_made_of_weights(name, recipe, tmp_path):
    function, parts, factors = MADE[name]
    report, qmodel = checked(recipe, Call(function, o=nn.Linear(8, 3), **parts), vectors, tmp_path / "m.onnx")
    outputs = 0 if recipe == "hyperblock-int4" else factors // 2  # what the product of two weights returns
    assert report.exported.get("folded", 0) == factors + outputs
    if not factors:
        return
    with torch.no_grad():
        qmodel._model.a.add_(1)
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", vectors(3))
    assert found.changed == ("a",)
    assert any(site.wrong == site.elements for site in found.sites if site.name.endswith("/right"))


#: weights that a layer reads through views
VIEWED = {
    "linear": (lambda m, x: m.o(F.linear(m.i(x), m.w.reshape(16, 8)).relu()), (4, 4, 8)),
    "kernel": (
        lambda m, x: m.o(F.conv2d(m.i(x)[:, :, None, None], m.w.reshape(16, 8, 1, 1), m.c).flatten(1)),
        (4, 4, 8),
    ),
    "channels in another order": (
        lambda m, x: m.o(F.conv2d(m.i(x)[:, :, None, None], m.w.permute(1, 0, 2).reshape(16, 8, 1, 1), m.c).flatten(1)),
        (4, 4, 8),
    ),
    "transposed": (lambda m, x: m.o(F.linear(m.i(x), m.w.flatten(1).t())), (8, 4, 4)),
    "cut": (lambda m, x: m.o(F.linear(m.i(x), m.w[::2, 1:9])), (32, 10)),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("linear", "hyperblock-int4"),
        ("kernel", "hyperblock-int4"),
        ("kernel", "deploy-int8"),
        ("channels in another order", "deploy-int8"),
        ("transposed", "in-hindsight-w8a8g8"),
        ("cut", "deploy-int8"),
    ],
)
def test_views_of_weights(name, recipe, tmp_path):
    function, shape = VIEWED[name]
    model = Call(function, i=nn.Linear(8, 8), o=nn.Linear(16, 3), w=shape, c=(16,))
    checked(recipe, model, vectors, tmp_path / "m.onnx")


@pytest.mark.parametrize("ends", [(0, 0.5), (-1, 0.5), (0, 6), (None, 0.5)])
def test_bounds(ends, tmp_path):
    model = Call(lambda m, x: m.o(m.i(x).clamp(*ends)), i=nn.Linear(8, 8), o=nn.Linear(8, 3))
    checked("deploy-int8", model, vectors, tmp_path / "m.onnx")
