"""Models that depend on the values of a tensor: the line and the layer in one line, and nothing of torch's own."""

import inspect
import sys

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.exporting.data_dependence import explain_branch, explain_size


class Inner(nn.Module):
    """A branch, below a path."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Branch(nn.Module):
    """A branch between two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(4, 4), Inner(), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.inner(self.a(x)))


class Cut(Branch):
    """A size from a value."""

    def forward(self, x):
        return self.b(x[: int(x[0, 0].abs()) + 1])


class Masked(Branch):
    """A mask in front of a layer."""

    def forward(self, x):
        y = self.a(x)
        return self.b(y[y[:, 0] > 0])


class Selected(Branch):
    """A choice that is none of Python, and a mask that multiplies; forward prints."""

    def forward(self, x):
        print("of the user", file=sys.stderr)
        y = self.a(x)
        y = torch.where(y.sum() > 0, y * 2, y)
        return self.b(y * (y[:, :1] > 0))


def compile_model(model):
    return qcompiler.compile(model, "hyperblock-int8", backend="eager")


def find_line(kind, text):
    lines, first = inspect.getsourcelines(kind)
    return f"{__file__}:{first + next(at for at, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("call", ["export_onnx", "export_stages"])
@pytest.mark.parametrize(
    ("model", "kind", "text", "path"),
    [(Branch(), Inner, "x.sum()", "inner, "), (Cut(), Cut, "int(x", "one graph: ")],
)
def test_a_branch_is_told_by_its_line(call, model, kind, text, path, tmp_path, capfd):
    rest = (tmp_path / "m.onnx",) if call == "export_onnx" else ()
    with pytest.raises(qcompiler.ExportError) as caught:
        getattr(qcompiler, call)(compile_model(model), *rest, (torch.randn(3, 4),))
    message = str(caught.value)
    assert f"{path}{find_line(kind, text)} (" in message
    assert "a branch or a size follows from the values of a tensor" in message
    assert "valid: torch.where" in message
    assert "guard" not in message
    assert capfd.readouterr() == ("", "")


def test_a_mask_is_told_by_the_layer_and_its_line(tmp_path, capfd):
    with pytest.raises(qcompiler.ExportError) as caught:
        qcompiler.export_onnx(compile_model(Masked()), tmp_path / "m.onnx", (torch.randn(3, 4),))
    assert str(caught.value).startswith(f"export: b: reads a tensor, made at {find_line(Masked, 'y[y[')}: ")
    assert "valid: a mask that multiplies" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_choices_of_the_graph_are_exported(tmp_path, capfd):
    qmodel, path = compile_model(Selected()), tmp_path / "m.onnx"
    qcompiler.export_onnx(qmodel, path, (torch.randn(3, 4),))
    assert qcompiler.verify_onnx(qmodel, path, (torch.randn(5, 4),)).exact
    assert "of the user" in capfd.readouterr().err  # torch's own prints alone are gone


def test_other_errors_are_none_of_these():
    assert explain_branch(nn.Linear(2, 2), ValueError("no")) == ""
    assert explain_size(torch.fx.Graph(), None) == ""
