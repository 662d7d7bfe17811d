"""Barriers behind operators whose kernels on codes give other numbers than their kernels on floats."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.edits import insert_barrier_behind
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import find_dequantize


@dataclasses.dataclass(frozen=True)
class ShieldFloatKernels:
    """A barrier behind each of these operators, if it reads dequantized codes:

    1. Softmax: QLinearSoftmax multiplies powers from a table of integers; 1 of 50 codes is another one.
    2. AveragePool with ceil_mode: QLinearAveragePool counts the missing elements of a cut window. With dilations there
       is no such kernel, and onnxruntime refuses its own graph.
    """

    name: ClassVar[str] = "shield-float-kernels"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of operators."""
        return sum(
            insert_barrier_behind(subject.graph, node)
            for node in list(subject.graph)
            if _has_other_kernel(node) and any(find_dequantize(value) is not None for value in node.inputs)
        )


def _has_other_kernel(node: ir.Node) -> bool:
    given = node.attributes
    if node.op_type == "AveragePool":
        dilations = given["dilations"].as_ints() if "dilations" in given else ()
        return bool(given.get_int("ceil_mode", 0)) or any(step != 1 for step in dilations)
    return node.op_type == "Softmax"
