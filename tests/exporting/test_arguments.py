"""Arguments of all kinds: keywords of a **kw, None, numbers; a file has all tensors, and the rest as constants."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, ShapesCollection

import qcompiler
from qcompiler.exporting.signature import get_signature


class Layers(nn.Module):
    """Two layers, which the models below call in their ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Keywords(Layers):
    """Reads its keywords in another order than they come in."""

    def forward(self, x, **kw):
        y = self.a(x) - 2 * self.b(kw["y"])
        return y + kw["deep"]["z"][0] if "deep" in kw else y


class OnlyKeywords(Layers):
    """Has no argument with a name."""

    def forward(self, **kw):
        return self.a(kw["x"]) - 2 * self.b(kw["y"])


class ByPosition(Layers):
    """An argument by position, whose name a keyword may have in Python."""

    def forward(self, x, /, **kw):
        return self.a(x) - 2 * self.b(kw["x"])


class Scaled(Layers):
    """A mask that may be None, a number, a flag."""

    def forward(self, x, mask=None, scale=1.0, twice=False):
        h = self.a(x) * scale
        h = h if mask is None else h * mask
        return self.b(self.b(h) if twice else h)


def rows(*sizes):
    return torch.randn(*sizes, 8)


def exported(model, recipe, path, args, kwargs, **options):
    torch.manual_seed(0)
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(*args, **kwargs).square().mean().backward()
    qcompiler.export_onnx(qmodel, path, args, example_kwargs=kwargs, **options)
    return qmodel


def inputs_of(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {one.name: one.shape for one in session.get_inputs()}


@pytest.mark.parametrize("recipe", ["hyperblock-int8", "deploy-int8"])
@pytest.mark.parametrize("model", [Keywords(), OnlyKeywords()])
def test_keywords_are_inputs_by_their_names(model, recipe, tmp_path):
    path = tmp_path / "m.onnx"
    qmodel = exported(model, recipe, path, (), {"y": rows(4), "x": rows(4)})
    assert inputs_of(path) == {"y": ["batch", 8], "x": ["batch", 8]}
    found = qcompiler.verify_onnx(qmodel, path, (), example_kwargs={"x": rows(7), "y": rows(7)})
    assert found.exact
    assert found.plain < 1e-6
    assert "forward" not in vars(model)


def test_keywords_below_names_of_their_own(tmp_path):
    path = tmp_path / "m.onnx"
    qmodel = exported(Keywords(), "hyperblock-int8", path, (rows(4),), {"deep": {"z": [rows(4)]}, "y": rows(4)})
    assert sorted(inputs_of(path)) == ["deep_z_0", "x", "y"]
    assert qcompiler.verify_onnx(qmodel, path, (rows(3),), kwargs={"y": rows(3), "deep": {"z": [rows(3)]}}).exact


def collection(x, y):
    shapes = ShapesCollection()
    shapes[x], shapes[y] = {0: Dim("n")}, {0: Dim("n")}
    return shapes


@pytest.mark.parametrize("form", ["below kw", "flat", "tuple", "collection"])
def test_free_dimensions_of_keywords(form, tmp_path):
    x, y = rows(4), rows(4)
    shapes = {
        "below kw": {"x": {0: "n"}, "kw": {"y": {0: "n"}}},
        "flat": {"x": {0: "n"}, "y": {0: "n"}},
        "tuple": ({0: "n"}, {0: "n"}),
        "collection": collection(x, y),
    }[form]
    exported(Keywords(), "identity", tmp_path / "m.onnx", (x,), {"y": y}, dynamic_shapes=shapes)
    assert inputs_of(tmp_path / "m.onnx") == {"x": ["n", 8], "y": ["n", 8]}


def test_a_calibration_by_keywords(tmp_path):
    path = tmp_path / "m.onnx"
    data = [((rows(4),), {"y": rows(4)}) for _ in range(2)]
    qmodel = exported(Keywords(), "current-w8a8g8", path, *data[0], calibration=data)
    assert qcompiler.verify_onnx(qmodel, path, (rows(3),), kwargs={"y": rows(3)}).exact


def test_one_name_by_position_and_by_keyword(tmp_path):
    with pytest.raises(
        qcompiler.ExportError, match=r"inputs: forward takes x by position, .*; valid: keywords of other"
    ):
        exported(ByPosition(), "identity", tmp_path / "m.onnx", (rows(4),), {"x": rows(4)})
    assert str(get_signature(Keywords(), {"x": 1, "y": 2})) == "(x, *, y)"


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "deploy-int8"])
@pytest.mark.parametrize(
    "rest",
    [(None,), (None, 0.5), (torch.rand(4, 1), 0.5), (torch.rand(4, 1), 2, True), (None, torch.tensor(0.5), False)],
)
def test_none_and_numbers(rest, recipe, tmp_path):
    path = tmp_path / "m.onnx"
    qmodel = exported(Scaled(), recipe, path, (rows(4), *rest), {})
    more = [torch.rand(7, 1) if isinstance(one, torch.Tensor) and one.ndim else one for one in rest]
    found = qcompiler.verify_onnx(qmodel, path, (rows(7), *more))
    assert found.exact
    assert found.plain < 1e-6


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ((None, 0.5), (None, 0.25), "input scale: the file was made with 0.5, and got 0.25"),
        ((None, 0.5), (None,), "input scale: the file was made with 0.5, and got 1.0"),
        ((None,), (torch.ones(4, 1),), "input mask: the file was made with None, and got a tensor"),
        ((torch.ones(4, 1),), (), "input mask: the file was made with a tensor, and got None"),
        ((None, torch.tensor(0.5)), (None, 0.5), "input scale: the file was made with a tensor, and got 0.5"),
        ((None, 1.0), (None, 1.0, True), "input twice: the file was made with False, and got True"),
        ((None, 1.0), (), None),
    ],
)
def test_constants_of_a_file(made, given, message, tmp_path):
    """A file computes with the number that it was made with, whatever a verification gives."""
    path = tmp_path / "m.onnx"
    qmodel = exported(Scaled(), "identity", path, (rows(4), *made), {})
    if message is None:
        assert qcompiler.verify_onnx(qmodel, path, (rows(4), *given)).plain < 1e-6
        return
    with pytest.raises(qcompiler.ExportError, match=f"^verify: {message}; valid: a tensor for a tensor"):
        qcompiler.verify_onnx(qmodel, path, (rows(4), *given))
