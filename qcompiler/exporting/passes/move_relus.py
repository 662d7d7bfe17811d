"""Relus stand at the linear layer, so that onnxruntime sees the layer and the quantizer together."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.edits import replace_node
from qcompiler.exporting.exported_model import ExportedModel


@dataclasses.dataclass(frozen=True)
class MoveRelus:
    """Gemm → Reshape → Relu becomes Gemm → Relu → Reshape, which gives the same; a Clip moves alike.

    The rows of a linear layer are split before its relu. onnxruntime makes a Gemm and the quantizer behind it one
    integer contraction; it moves a quantizer over a view, but not over a relu and a view.
    """

    name: ClassVar[str] = "move-relus"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of relus."""
        return sum(_move_relu(subject.graph, node) for node in list(subject.graph) if node.op_type in ("Relu", "Clip"))


def _move_relu(graph: ir.Graph, relu: ir.Node) -> bool:
    view = None if relu.inputs[0] is None else relu.inputs[0].producer()
    rows = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
    layer = None if rows is None else rows.producer()
    if view is None or rows is None or layer is None or layer.op_type != "Gemm":
        return False
    first = ir.node(relu.op_type, [rows, *relu.inputs[1:]], relu.attributes, name=relu.name)
    last = ir.node("Reshape", [first.outputs[0], view.inputs[1]], view.attributes, name=view.name)
    replace_node(graph, relu, [first, last])
    first.outputs[0].shape = rows.shape
    return True
