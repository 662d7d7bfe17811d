"""The origin of a value of an ONNX graph, through nodes that onnxruntime moves quantizers over or leaves out."""

from typing import Final

import onnx_ir as ir

from qcompiler.exporting.edits import read_array

#: operators that onnxruntime moves DequantizeLinear over
_MOVERS: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool"})
#: operators that onnxruntime leaves out, at least for some operands
_COPIES: Final = frozenset({"Identity", "Dropout", "Expand", "Tile", "Pad"})
#: operators that give back their input if the other operand is this number
_NEUTRAL: Final = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}
#: operators that give back their input if it is the only one
_JOINS: Final = frozenset({"Concat", "Max", "Min", "Sum", "Mean"})
#: operators that onnxruntime leaves out in front of a quantizer that makes the same codes without them
_CUTS: Final = frozenset({"Relu", "Clip"})
_FOUR_BITS: Final = (ir.DataType.INT4, ir.DataType.UINT4)


def find_source(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value, in front of those that `may_go`."""
    node = None if value is None else value.producer()
    while node is not None and may_go(node):
        node = _find_operand(node)
    return node


def find_dequantize(value: ir.Value | None, but: frozenset[str] = frozenset()) -> ir.Node | None:
    """Return the DequantizeLinear that a value comes from through nothing that onnxruntime keeps; not through `but`."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type not in but and (node.op_type in _CUTS or may_go(node)):
        node = _find_operand(node)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def may_go(node: ir.Node) -> bool:
    """Return True for a node that onnxruntime moves quantizers over, or leaves out."""
    if node.op_type in _NEUTRAL:
        known = [read_array(one) for one in node.inputs if one is not None and one.const_value is not None]
        return len(known) == 1 and bool((known[0] == _NEUTRAL[node.op_type]).all())
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype
    return node.op_type in _MOVERS | _COPIES or (node.op_type in _JOINS and len(node.inputs) == 1)


def list_four_bit_points(graph: ir.Graph) -> list[ir.Value]:
    """Return the zero points of the quantizers of 4 bits."""
    points = [node.inputs[2] for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2]
    return [point for point in points if point is not None and point.dtype in _FOUR_BITS]


def _find_operand(node: ir.Node) -> ir.Node | None:
    """Return the node that computes the first operand that is no constant."""
    operands = [one for one in node.inputs if one is not None and one.const_value is None]
    return operands[0].producer() if operands else None
