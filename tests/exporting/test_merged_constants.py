"""Equal parameters, which torch's exporter merges under the first name: the constant tells the other names."""

import onnx
import pytest
import torch
from torch import nn

import qcompiler


def lines_of(model, recipe="identity", size=4):
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    stages = qcompiler.export_stages(qmodel, (torch.randn(3, size),))
    translated = next(stage.text for stage in stages if stage.name == "translated")
    return {
        line.split(" : ")[0].lstrip("%"): line.partition("  # ")[2]
        for text in (translated, stages[-1].text)
        for line in text.splitlines()
        if " = constant" in line
    }


def test_every_parameter_is_named():
    """A fresh batch norm has the numbers of a fresh layer norm."""
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    notes = lines_of(model)
    assert notes["0.weight"] == "also 1.weight, 2.weight, 2.running_var"
    assert notes["0.bias"] == "also 1.bias, 2.bias, 2.running_mean"
    held = {**dict(model.named_parameters()), "2.running_mean": 0, "2.running_var": 0}
    named = {name for kept, note in notes.items() for name in [kept, *note.removeprefix("also ").split(", ")]}
    assert held.keys() <= named


def test_other_numbers_have_no_note():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    with torch.no_grad():
        for count, parameter in enumerate(model.parameters()):
            parameter.fill_(count)
    notes = lines_of(model)
    assert {name: notes[name] for name in dict(model.named_parameters())} == dict.fromkeys(
        ["0.weight", "0.bias", "1.weight", "1.bias"], ""
    )


@pytest.mark.parametrize("sizes", [(4, 5), (5, 4)])
def test_equal_numbers_of_another_shape_have_no_note(sizes):
    first, second = sizes
    model = nn.Sequential(nn.LayerNorm(first), nn.Linear(first, second), nn.LayerNorm(second))
    notes = lines_of(model, size=first)
    assert notes["0.weight"] == notes["2.weight"] == ""


def test_the_file_has_the_names(tmp_path):
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    qmodel = qcompiler.compile(model, "identity", backend="eager")
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(3, 4),))
    graph = onnx.load(tmp_path / "m.onnx").graph
    notes = {one.name: one.doc_string for one in [*graph.value_info, *graph.initializer] if one.doc_string}
    assert notes == {"0.weight": "also 1.weight", "0.bias": "also 1.bias"}
