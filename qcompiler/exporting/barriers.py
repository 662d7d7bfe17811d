"""Nodes between two quantizers that onnxruntime would leave out, or compute on codes with other numbers.

A barrier is −(−x): the same number to the bit, which no optimization takes out or looks through.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.guards import four_bit_points
from qcompiler.exporting.writer import may_go, operand, put_behind, put_in_front

#: operators that onnxruntime leaves out in front of a quantizer that makes the same codes without them
_CUTS: Final = frozenset({"Relu", "Clip"})
#: operators that are moved into 4-bit codes, for which they have no kernel
_LARGEST: Final = frozenset({"MaxPool", "ReduceMax", "ReduceMin"})


def keep_float_kernels(graph: ir.Graph) -> None:
    """Puts a barrier behind operators whose kernels on codes give other numbers than those on floats.

    1. Softmax: QLinearSoftmax multiplies powers from a table of integers; 1 of 50 codes is another one.
    2. AveragePool with ceil_mode: QLinearAveragePool counts what a cut window does not hold. With dilations there is no
       such kernel, and onnxruntime refuses its own graph.
    """
    for node in list(graph):
        if _has_other_kernel(node) and any(find_dequantizer(value) is not None for value in node.inputs):
            put_behind(graph, node)


def _has_other_kernel(node: ir.Node) -> bool:
    given = node.attributes
    if node.op_type == "AveragePool":
        dilations = given["dilations"].as_ints() if "dilations" in given else ()
        return bool(given.get_int("ceil_mode", 0)) or any(step != 1 for step in dilations)
    return node.op_type == "Softmax"


def keep_quantizers_apart(graph: ir.Graph) -> None:
    """Puts a barrier between two quantizers of other ranges where nothing that stays in the graph is between them.

    onnxruntime leaves out factors of 1, sums with 0, copies, casts, relus that a range implies, and views that undo
    each other. Two quantizers side by side become one, of a third range: the common part of both.
    """
    for node in [node for node in graph if node.op_type == "QuantizeLinear" and not node.domain]:
        first = find_dequantizer(node.inputs[0], but=_LARGEST)
        if first is not None and not _is_same_range(first, node):
            put_in_front(graph, node)


def keep_four_bits(graph: ir.Graph) -> None:
    """Puts barriers around operators that onnxruntime would compute on 4-bit codes, for which it has no kernel.

    It makes a QLinearConv of a convolution between any two quantizers of one type, and moves 4-bit codes over largest
    and smallest numbers.
    """
    found = [node for node in graph if len(node.outputs) == 1] if four_bit_points(graph) else []
    for node in found:
        if node.op_type == "Conv" and find_dequantizer(node.inputs[0]) is not None:
            put_behind(graph, node)
        elif node.op_type in _LARGEST:
            put_in_front(graph, node)
            put_behind(graph, node)


def find_dequantizer(value: ir.Value | None, but: frozenset[str] = frozenset()) -> ir.Node | None:
    """The DequantizeLinear that a value comes from through nothing that onnxruntime keeps; not through `but`."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type not in but and (node.op_type in _CUTS or may_go(node)):
        node = operand(node)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_same_range(first: ir.Node, last: ir.Node) -> bool:
    """True where a quantizer makes of dequantized codes the same codes again."""
    pairs = zip((*first.inputs, None)[1:3], (*last.inputs, None)[1:3], strict=True)
    return all(_is_same_constant(*pair) for pair in pairs)


def _is_same_constant(one: ir.Value | None, other: ir.Value | None) -> bool:
    held = [None if value is None or value.const_value is None else value.const_value for value in (one, other)]
    if held[0] is None or held[1] is None:
        return one is other
    return held[0].dtype == held[1].dtype and np.array_equal(held[0].numpy(), held[1].numpy())
