"""Barriers between two quantizers that onnxruntime would make one."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.edits import insert_barrier_in_front
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import find_dequantize
from qcompiler.exporting.passes.shield_four_bits import LARGEST


@dataclasses.dataclass(frozen=True)
class SeparateQuantizers:
    """A barrier between two quantizers of other ranges, if nothing that stays in the graph is between them.

    onnxruntime leaves out factors of 1, sums with 0, copies, casts, relus that a range implies, and views that undo
    each other. Two quantizers side by side become one, of a third range: the common part of both.
    """

    name: ClassVar[str] = "separate-quantizers"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of quantizers with a new barrier in front."""
        quantizers = [node for node in subject.graph if node.op_type == "QuantizeLinear" and not node.domain]
        return sum(insert_barrier_in_front(subject.graph, node) for node in quantizers if _would_merge(node))


def _would_merge(quantizer: ir.Node) -> bool:
    first = find_dequantize(quantizer.inputs[0], but=LARGEST)
    return first is not None and not _is_same_range(first, quantizer)


def _is_same_range(first: ir.Node, last: ir.Node) -> bool:
    """Return True if a quantizer makes of dequantized codes the same codes again."""
    pairs = zip((*first.inputs, None)[1:3], (*last.inputs, None)[1:3], strict=True)
    return all(_is_same_constant(*pair) for pair in pairs)


def _is_same_constant(one: ir.Value | None, other: ir.Value | None) -> bool:
    held = [None if value is None or value.const_value is None else value.const_value for value in (one, other)]
    if held[0] is None or held[1] is None:
        return one is other
    return held[0].dtype == held[1].dtype and np.array_equal(held[0].numpy(), held[1].numpy())
