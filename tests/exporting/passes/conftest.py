"""Fixtures of the passes over ONNX models: models from text and from torch, and the text of a graph."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch

import qcompiler
from qcompiler.exporting import build
from qcompiler.exporting.exported_model import ExportedModel, verify_structure
from qcompiler.exporting.text import model_text
from qcompiler.exporting.trace import trace_model
from qcompiler.passes.base import Pipeline

_HEAD = '<ir_version: 10, opset_import: ["" : 21, "qcompiler" : 1]>'


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights and inputs are the same in every run and every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def parse_model() -> Callable[..., ExportedModel]:
    """parse_model(text) → a model from the text form of ONNX, `g (float[2,4] x) => (float[2,3] y) <…> { … }`.

    Nodes are named n0, n1, …; `shapes` and element types of values between them are inferred by onnx.
    """

    def make(text: str) -> ExportedModel:
        import onnx

        proto = onnx.parser.parse_model(_HEAD + text)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        for index, node in enumerate(model.graph):
            node.name = node.name or f"n{index}"
        return ExportedModel(model)

    return make


@pytest.fixture(scope="session")
def translated() -> Callable[..., ExportedModel]:
    """translated(recipe, model, *inputs) → what torch's exporter makes of a trained model, stand-ins included."""

    def make(recipe: Any, model: torch.nn.Module, *inputs: torch.Tensor) -> ExportedModel:
        torch._dynamo.reset()
        qmodel = qcompiler.compile(model, recipe, backend="eager")
        qmodel(*inputs).sum().backward()
        return ExportedModel(build.translate_program(trace_model(qmodel, inputs, {}, None), 21))

    return make


@pytest.fixture(scope="session")
def settle_onnx() -> Callable[[ExportedModel, Any], int]:
    """settle_onnx(subject, pass) → what the pass returned; run again it returns 0 and leaves the text as it is."""

    def run(subject: ExportedModel, step: Any) -> int:
        counts: list[int] = []
        pipeline = Pipeline((step,), verify_structure)
        pipeline(subject, lambda name, changes, subject: counts.append(changes))
        text = model_text(subject.model)
        pipeline(subject, lambda name, changes, subject: counts.append(changes))
        assert counts[1] == 0
        assert model_text(subject.model) == text
        return counts[0]

    return run


@pytest.fixture(scope="session")
def onnx_text() -> Callable[[ExportedModel], str]:
    """onnx_text(subject) → the graph as stable text, one node a line."""
    return lambda subject: model_text(subject.model)
