"""Contractions with a transposed weight of stored codes do the transposition themselves."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.edits import replace_node
from qcompiler.exporting.exported_model import ExportedModel


@dataclasses.dataclass(frozen=True)
class TransposeInGemms:
    """x @ wᵀ, two-dimensional with stored codes w → Gemm(x, w, transB=1); a MatMul and a Gemm alike.

    Of a transposition in front onnxruntime makes one of the codes, and of the contraction a MatMulNBits, which rounds x
    to 8 bits.
    """

    name: ClassVar[str] = "transpose-in-gemms"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of contractions."""
        nodes = [node for node in subject.graph if node.op_type in ("MatMul", "Gemm")]
        return sum(_transpose_weight(subject.graph, node) for node in nodes)


def _transpose_weight(graph: ir.Graph, contraction: ir.Node) -> bool:
    left, right, *bias = contraction.inputs
    turn = None if right is None else right.producer()
    floats = turn.inputs[0] if turn is not None and turn.op_type == "Transpose" else None
    if not _has_stored_codes(floats) or left is None or left.shape is None:
        return False
    given = contraction.attributes
    if left.shape.rank() != 2 or ("transB" in given and given["transB"].as_int()):
        return False
    made = ir.node("Gemm", [left, floats, *bias], {**given, "transB": 1}, name=contraction.name)
    replace_node(graph, contraction, [made])
    return True


def _has_stored_codes(floats: ir.Value | None) -> bool:
    """Return True for a value that DequantizeLinear gives, also through the cast of a model in float16."""
    node = None if floats is None else floats.producer()
    if node is not None and node.op_type == "Cast":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"
