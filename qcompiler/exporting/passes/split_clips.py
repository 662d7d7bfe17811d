"""Clips and relus beside quantizers of 4 bits, in a form that onnxruntime takes and keeps."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.edits import add_constant, read_array, replace_node
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import list_four_bit_points


@dataclasses.dataclass(frozen=True)
class SplitClips:
    """In a graph with quantizers of 4 bits:

    1. Clip(x, low, high) → Min(Max(x, low), high): onnxruntime refuses a Clip in front of such a quantizer.
    2. Relu(x) → Max(x, 0), if the zero point of any such quantizer is not the first code: onnxruntime leaves the Relu
       out whatever the zero point, and half of the codes were wrong.
    """

    name: ClassVar[str] = "split-clips"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of clips and relus."""
        graph = subject.graph
        points = list_four_bit_points(graph)
        if not points:
            return 0
        kinds = ("Clip",) if all(map(_is_first_code, points)) else ("Clip", "Relu")
        return sum(_split_node(graph, node) for node in list(graph) if node.op_type in kinds)


def _is_first_code(point: ir.Value) -> bool:
    return bool((read_array(point) == (0 if point.dtype == ir.DataType.UINT4 else -8)).all())


def _split_node(graph: ir.Graph, node: ir.Node) -> bool:
    bounds = node.inputs[1:] if node.op_type == "Clip" else (_add_zero(graph, node),)
    made: list[ir.Node] = []
    for op_type, bound in zip(("Max", "Min"), (*bounds, None, None), strict=False):
        if bound is not None:
            last = made[-1].outputs[0] if made else node.inputs[0]
            made.append(ir.node(op_type, [last, bound], name=f"{node.name}/{op_type}"))
    if made:
        replace_node(graph, node, made)
    return bool(made)


def _add_zero(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Return 0 in the type of a node."""
    kind = node.outputs[0].dtype or ir.DataType.FLOAT
    return add_constant(graph, f"zero/{kind.name}", np.zeros((), kind.numpy()))
