"""What a model is called with: a file has every input, and free dimensions have the names that they were given."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, ShapesCollection

import qcompiler


class Pair(nn.Module):
    """Reads two inputs of one shape in different ways; both may come in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.t = nn.Buffer(torch.eye(8))  # as torch names a transposition

    def forward(self, a, b=None):
        a, b = (a["a"], a["b"]) if isinstance(a, dict) else (a, b)
        return self.last((self.first(a) - 2 * self.first(b @ self.t)).relu() @ self.first.weight.t())


def rows(*sizes):
    return torch.randn(*sizes, 8)


def trained(recipe, *args, model=None):
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model or Pair(), recipe, backend="eager")
    for _ in range(2):
        qmodel(*args).square().mean().backward()
    return qmodel


def shapes_of(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [one.shape for one in (*session.get_inputs(), *session.get_outputs())]


def alike(kind):
    """An example whose two tensors are one, or share memory."""
    x = rows(4)
    wide = torch.randn(4, 16)
    match kind:
        case "view":
            return x, x.view(4, 8)
        case "slices":
            return wide[:, :8], wide[:, :8]
    return (x, x) if kind == "same" else ({"a": x, "b": x},)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("same", "in-hindsight-w8a8g8"),
        ("same", "current-w8a8g8"),
        ("view", "identity"),
        ("slices", "identity"),
        ("dict", "hyperblock-int8"),
    ],
)
def test_a_tensor_given_twice_is_two_inputs(kind, recipe, tmp_path):
    def call(a, b):
        return ({"a": a, "b": b},) if kind == "dict" else (a, b)

    qmodel = trained(recipe, *call(rows(4), rows(4)))
    example = alike(kind)
    options = {"calibration": [example, call(rows(4), rows(4))]} if recipe == "current-w8a8g8" else {}
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", example, **options)
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", call(rows(9), rows(9)))
    assert found.exact
    assert shapes_of(tmp_path / "m.onnx") == [["batch", 8], ["batch", 8], ["batch", 4]]
    if not options:
        assert found.plain < 1e-6
        assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", example).plain < 1e-6


def test_a_parameter_can_be_the_example(tmp_path):
    model = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
    qmodel = trained("hyperblock-int8", rows(4), model=model)
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (model[1].weight,), dynamic_batch=False)
    assert shapes_of(tmp_path / "m.onnx") == [[8, 8], [8, 8]]
    assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (rows(8),)).exact


BATCH, LENGTH = Dim("batch"), Dim("length", min=2, max=64)
NAMED = {
    "default": ((rows(4), rows(4)), {}, [["batch", 8], ["batch", 8], ["batch", 4]]),
    "dict": (
        (rows(4, 5), rows(4, 5)),
        {"dynamic_shapes": {"a": {0: BATCH, 1: LENGTH}, "b": {0: BATCH, 1: LENGTH}}},
        [["batch", "length", 8], ["batch", "length", 8], ["batch", "length", 4]],
    ),
    "tuples": (
        (rows(4, 5), rows(4, 5)),
        {"dynamic_shapes": ((BATCH, LENGTH, None), (BATCH, LENGTH, None))},
        [["batch", "length", 8], ["batch", "length", 8], ["batch", "length", 4]],
    ),
    "strings": (
        (rows(4, 5), rows(4, 5)),
        {"dynamic_shapes": {"a": {1: "s31"}, "b": {1: "s31"}}},  # what torch could call another dimension
        [[4, "s31", 8], [4, "s31", 8], [4, "s31", 4]],
    ),
    "nested": (
        ({"a": rows(4), "b": rows(4)},),
        {"dynamic_shapes": {"a": {"a": {0: "n"}, "b": {0: "n"}}}},
        [["n", 8], ["n", 8], ["n", 4]],
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", NAMED)
def test_free_dimensions_have_the_names_that_were_given(name, tmp_path):
    example, options, expected = NAMED[name]
    qmodel = trained("hyperblock-int8", *example)
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", example, **options)
    assert shapes_of(tmp_path / "m.onnx") == expected


def test_an_example_that_the_model_would_change_keeps_its_values(tmp_path):
    x = rows(4)
    before = x.clone()
    qmodel = trained("hyperblock-int8", rows(4), model=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    with pytest.raises(qcompiler.ExportError, match="eval mode changes input"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x,))
    assert torch.equal(x, before)


def test_a_derived_dimension_and_a_collection(tmp_path):
    class Longer(nn.Linear):
        def forward(self, x, y):
            return super().forward(x).repeat(2, 1) + y

    x, y = rows(4), rows(8)
    shapes = ShapesCollection()
    shapes[x], shapes[y] = {0: BATCH}, {0: 2 * BATCH}
    qmodel = trained("hyperblock-int8", x, y, model=Longer(8, 8))
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (x, y), dynamic_shapes=shapes)
    assert shapes_of(tmp_path / "m.onnx") == [["batch", 8], ["2*batch", 8], ["2*batch", 8]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": {0: "batch size"}, "b": {0: "n"}}, r"dynamic_shapes: got 'batch size'; valid: a name such as 'batch'"),
        (
            {"a": {0: "n"}, "b": {0: "m"}},
            r"(?s)must always be equal.*Give the dimensions that are always equal one name",
        ),
    ],
)
def test_names_that_cannot_be(shapes, message, tmp_path):
    qmodel = trained("identity", rows(4), rows(4))
    with pytest.raises(qcompiler.ExportError, match=message):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (rows(4), rows(4)), dynamic_shapes=shapes)
