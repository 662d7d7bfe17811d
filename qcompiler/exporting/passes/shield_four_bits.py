"""Barriers around operators that onnxruntime would compute on 4-bit codes."""

import dataclasses
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.exporting.edits import insert_barrier_behind, insert_barrier_in_front
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import find_dequantize, list_four_bit_points

#: operators that are moved into 4-bit codes, for which they have no kernel
LARGEST: Final = frozenset({"MaxPool", "ReduceMax", "ReduceMin"})


@dataclasses.dataclass(frozen=True)
class ShieldFourBits:
    """In a graph with quantizers of 4 bits, for which onnxruntime has no kernels:

    1. A barrier behind each convolution of dequantized codes: of a convolution between any two quantizers of one type
       it makes a QLinearConv.
    2. Barriers in front of and behind largest and smallest numbers, over which it moves codes.
    """

    name: ClassVar[str] = "shield-four-bits"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of operators."""
        graph = subject.graph
        if not list_four_bit_points(graph):
            return 0
        return sum(_shield_operator(graph, node) for node in list(graph) if len(node.outputs) == 1)


def _shield_operator(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type == "Conv" and find_dequantize(node.inputs[0]) is not None:
        return insert_barrier_behind(graph, node)
    if node.op_type in LARGEST:
        in_front = insert_barrier_in_front(graph, node)
        return insert_barrier_behind(graph, node) or in_front
    return False
