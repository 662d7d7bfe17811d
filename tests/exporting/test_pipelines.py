"""The two pipelines of an export: names, and errors of their passes."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.compiler.pipelines import frozen_pipeline, joint_pipeline
from qcompiler.exporting.passes.name_nodes import NameNodes
from qcompiler.exporting.pipeline import onnx_pipeline
from qcompiler.exporting.trace import ExportError
from qcompiler.passes.frozen.unite_blocks import UniteBlocks

PAGE = Path(qcompiler.__file__).parents[1] / "docs" / "onnx.md"


def test_every_pass_has_its_own_name_and_is_written_down_in_order():
    export = [step.name for step in (*frozen_pipeline().passes, *onnx_pipeline().passes)]
    joint = [step.name for step in joint_pipeline(qcompiler.RECIPES["identity"]).passes]
    assert len({*export, *joint}) == len(export) + len(joint)
    section = PAGE.read_text(encoding="utf-8").partition("## The passes of an export")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE) == export


def test_passes_are_values():
    """Their fields are their options: equal options, equal passes."""
    for passes in (frozen_pipeline().passes, onnx_pipeline().passes):
        assert all(dataclasses.is_dataclass(step) and step.__doc__ for step in passes)
    assert frozen_pipeline(fold_batch_norm=False).passes[-1] != frozen_pipeline().passes[-1]
    assert onnx_pipeline(signed_weights=True).passes[0] != onnx_pipeline().passes[0]


@pytest.mark.parametrize(
    ("step", "before"), [(UniteBlocks, "freeze-biases, calibrate-ranges"), (NameNodes, "remove-unused, add-functions")]
)
def test_a_pass_that_fails_is_named(step, before, tmp_path, monkeypatch):
    def fail(self, subject):
        raise RuntimeError("no memory")

    monkeypatch.setattr(step, "__call__", fail)
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "tensor-int8", backend="eager")
    message = rf"^export: pass {step.name} failed \(ran before it: .*{before}\): no memory$"
    with pytest.raises(ExportError, match=message):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert list(tmp_path.iterdir()) == []


def test_what_a_pass_refuses_keeps_its_words(tmp_path, monkeypatch):
    def refuse(self, subject):
        raise ExportError("export: 0/input: no form in ONNX")

    monkeypatch.setattr(NameNodes, "__call__", refuse)
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "tensor-int8", backend="eager")
    with pytest.raises(ExportError, match=r"^export: 0/input: no form in ONNX$"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))
