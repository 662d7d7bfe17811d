"""Wrong `dynamic_shapes`: an error names the argument, what was given, and a valid entry."""

import re

import pytest
import torch
from torch import nn
from torch.export import Dim

import qcompiler
from qcompiler.exporting.dimension_checks import check_dims

BATCH = Dim("b")


class Nested(nn.Module):
    """Tensors in a mapping and in a list."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, d):
        return self.layer(d["u"]) + self.layer(d["v"][0])


def rows(count=4):
    return torch.randn(count, 6)


def refusal(inputs, shapes):
    with pytest.raises(qcompiler.ExportError) as caught:
        check_dims(inputs, shapes)
    return str(caught.value)


@pytest.mark.parametrize(
    "shapes", ["batch", 3, True, 0, "", {"z": None}, {0: "b"}, {"x": None, "y": None}, (None,) * 2]
)
def test_there_is_an_entry_for_each_input(shapes):
    message = refusal({"x": rows()}, shapes)
    assert message.startswith(f"export: dynamic_shapes: got {shapes!r}; valid: one entry for each given input, ")
    assert '{"x": …}' in message


@pytest.mark.parametrize("axis", [9, 2, -1, "0", True, 0.0])
def test_axes_are_those_of_the_tensor(axis):
    expected = f"export: dynamic_shapes: x (4×6): got axis {axis!r}; valid: axes from 0 to 1"
    assert refusal({"x": rows()}, {"x": {axis: "b"}}) == expected


def test_a_number_has_no_axis():
    assert refusal({"x": torch.tensor(1.0)}, {"x": {0: "b"}}).endswith("x (a number): got axis 0; valid: no axis")


@pytest.mark.parametrize(
    ("dim", "valid"),
    [
        (Dim("b", max=2), "ends with the size of the example, 4, between them"),
        (Dim("b", min=8), "ends with the size of the example, 4, between them"),
        (5, "the size of the example, 4, or a name"),
        (3.5, "a name such as 'batch'"),
        (True, "a name such as 'batch'"),
        ({}, "a name such as 'batch'"),
    ],
)
def test_a_dimension_fits_the_example(dim, valid):
    message = refusal({"x": rows()}, {"x": {0: dim}})
    assert f"dynamic_shapes: x (4×6): axis 0: got {dim!r}; valid: {valid}" in message


@pytest.mark.parametrize("dim", ["b", BATCH, Dim.DYNAMIC])
def test_one_sample_is_a_constant_for_torch(dim):
    assert "valid: an example of at least 2 there" in refusal({"x": rows(1)}, {"x": {0: dim}})


@pytest.mark.parametrize(
    ("spec", "named"),
    [("b", "x (4×6): got 'b'"), (3, "x (4×6): got 3"), (("b",), "x (4×6): got ('b',); valid: 2 dimensions")],
)
def test_the_entry_of_a_tensor(spec, named):
    assert named in refusal({"x": rows()}, {"x": spec})


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"u": None}, "d: got {'u': None}; valid: a mapping with the keys 'u', 'v'"),
        (None, "d: got None; valid: a mapping with the keys 'u', 'v'"),
        ({"u": None, "v": []}, "d['v']: got []; valid: a list of 1 entries"),
        ({"u": None, "v": {0: "b"}}, "d['v']: got {0: 'b'}; valid: a list of 1 entries"),
        ({"u": {7: "b"}, "v": [None]}, "d['u'] (4×6): got axis 7"),
        ({"u": None, "v": [{7: "b"}]}, "d['v'][0] (4×6): got axis 7"),
    ],
)
def test_entries_of_containers(spec, named):
    assert named in refusal({"d": {"u": rows(), "v": [rows()]}}, {"d": spec})


@pytest.mark.parametrize(
    "shapes",
    [
        None,
        {},
        (),
        {"x": None, "n": None},
        ({0: "b"}, None),
        [("b", 6), None],
        {"x": {0: BATCH, 1: None}, "n": None},
        {"x": {0: 2 * BATCH}, "n": None},
        {"x": {0: Dim("b", min=4, max=5), 1: Dim.STATIC}, "n": None},
        {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "n": None},
    ],
)
def test_valid_entries_pass(shapes):
    check_dims({"x": rows(), "n": 2}, shapes)


def test_a_sample_may_be_left_to_torch():
    check_dims({"x": rows(1)}, {"x": {0: Dim.AUTO, 1: 6}})


@pytest.mark.parametrize("shapes", [{"d": {"u": {9: "b"}, "v": [None]}}, "batch", {"d": {"u": {-1: "b"}, "v": [None]}}])
def test_an_export_refuses_before_it_traces(shapes, tmp_path):
    qmodel = qcompiler.compile(Nested(), "hyperblock-int8", backend="eager")
    given = ({"u": rows(), "v": [rows()]},)
    with pytest.raises(qcompiler.ExportError, match=r"^export: dynamic_shapes: "):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", given, dynamic_shapes=shapes)


def test_the_features_of_a_layer_are_fixed(tmp_path):
    """The hint names the weight, and not only len(x), which this model does not call."""
    qmodel = qcompiler.compile(nn.Linear(6, 4), "identity", backend="eager")
    with pytest.raises(qcompiler.ExportError) as caught:
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (rows(),), dynamic_shapes={"input": {1: "b"}})
    message = str(caught.value)
    assert "a weight has that size, such as the features of a linear layer" in message
    assert "Valid: dynamic_shapes that leave this axis out" in message
    assert re.search(r"b = input\.shape\[1\]", message)
    assert "TORCH_LOGS" not in message
