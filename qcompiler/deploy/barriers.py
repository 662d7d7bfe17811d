"""Nodes between two quantizers that onnxruntime would leave out, or compute on codes with other numbers.

A barrier is −(−x): the same number to the bit, which no optimization takes out or looks through.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.deploy.guards import four_bit_points
from qcompiler.deploy.writer import MOVERS, put_behind, put_in_front

#: operators that give back their input where the other operand is this number
_NEUTRAL: Final = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}
#: operators that give back their input if it is the only one
_JOINS: Final = frozenset({"Concat", "Max", "Min", "Sum", "Mean"})
#: operators that onnxruntime leaves out in front of a quantizer that makes the same codes without them
_CUTS: Final = frozenset({"Relu", "Clip", "Identity", "Dropout", "Cast", "Expand", "Tile", "Pad"})
#: operators that are moved into 4-bit codes, for which they have no kernel
_LARGEST: Final = frozenset({"MaxPool", "ReduceMax", "ReduceMin"})


def keep_float_kernels(graph: ir.Graph) -> None:
    """Puts a barrier behind operators whose kernels on codes give other numbers than those on floats.

    1. Softmax: QLinearSoftmax multiplies powers from a table of integers; 1 of 50 codes is another one.
    2. AveragePool with ceil_mode: QLinearAveragePool counts what a cut window does not hold. With dilations there is no
       such kernel, and onnxruntime refuses its own graph.
    3. Resize between equal ranges, but for the nearest neighbor: sums of codes are cut, not rounded.
    """
    for node in list(graph):
        if _has_other_kernel(node) and any(find_dequantizer(value) is not None for value in node.inputs):
            put_behind(graph, node)


def _has_other_kernel(node: ir.Node) -> bool:
    given = node.attributes
    if node.op_type == "AveragePool":
        dilations = given["dilations"].as_ints() if "dilations" in given else ()
        return bool(given.get_int("ceil_mode", 0)) or any(step != 1 for step in dilations)
    return node.op_type == "Softmax" or (node.op_type == "Resize" and given.get_string("mode", "nearest") != "nearest")


def keep_quantizers_apart(graph: ir.Graph) -> None:
    """Puts a barrier between two quantizers of other ranges where nothing that stays in the graph is between them.

    onnxruntime leaves out factors of 1, sums with 0, copies, casts, relus that a range implies, and views that undo
    each other. Two quantizers side by side become one, of a third range: the common part of both.
    """
    for node in [node for node in graph if node.op_type == "QuantizeLinear" and not node.domain]:
        first = find_dequantizer(node.inputs[0], but=_LARGEST)
        if first is not None and not _is_same_range(first, node):
            put_in_front(graph, node)


def keep_largest(graph: ir.Graph) -> None:
    """Beside quantizers of 4 bits, puts barriers around largest and smallest numbers: no kernel has them of 4 bits."""
    if four_bit_points(graph):
        for node in [node for node in graph if node.op_type in _LARGEST and len(node.outputs) == 1]:
            put_in_front(graph, node)
            put_behind(graph, node)


def find_dequantizer(value: ir.Value | None, but: frozenset[str] = frozenset()) -> ir.Node | None:
    """The DequantizeLinear that a value comes from through nothing that onnxruntime keeps; not through `but`."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type not in but and _may_go(node):
        operands = [one for one in node.inputs if one is not None and one.const_value is None]
        node = operands[0].producer() if operands else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _may_go(node: ir.Node) -> bool:
    """True for a node that onnxruntime moves quantizers over, or leaves out."""
    if node.op_type in _NEUTRAL:
        known = [one.const_value.numpy() for one in node.inputs if one is not None and one.const_value is not None]
        return len(known) == 1 and bool((known[0] == _NEUTRAL[node.op_type]).all())
    return node.op_type in MOVERS or node.op_type in _CUTS or (node.op_type in _JOINS and len(node.inputs) == 1)


def _is_same_range(first: ir.Node, last: ir.Node) -> bool:
    """True where a quantizer makes of dequantized codes the same codes again."""
    pairs = zip((*first.inputs, None)[1:3], (*last.inputs, None)[1:3], strict=True)
    return all(_is_same_constant(*pair) for pair in pairs)


def _is_same_constant(one: ir.Value | None, other: ir.Value | None) -> bool:
    held = [None if value is None or value.const_value is None else value.const_value for value in (one, other)]
    if held[0] is None or held[1] is None:
        return one is other
    return held[0].dtype == held[1].dtype and np.array_equal(held[0].numpy(), held[1].numpy())
