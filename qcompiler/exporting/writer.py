"""Writing the nodes of one quantizer into an ONNX graph: names that start with its site, in front of its stand-in."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.blocks import Edges, find_edges, spread
from qcompiler.exporting.functions import DOMAIN, FUNCTIONS
from qcompiler.exporting.trace import ExportError
from qcompiler.runtime.numbers.spec import parse_spec

#: what onnxruntime moves DequantizeLinear over
_MOVERS: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool"})
#: what it leaves out, at least for some operands
_COPIES: Final = frozenset({"Identity", "Dropout", "Expand", "Tile", "Pad"})
#: operators that give back their input if the other operand is this number
_NEUTRAL: Final = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}
#: operators that give back their input if it is the only one
_JOINS: Final = frozenset({"Concat", "Max", "Min", "Sum", "Mean"})


class Quantizer:
    """A stand-in of a quantizer, what it says, and the nodes that are written in its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.site = node.attributes["site"].as_string()
        self.spec = parse_spec(node.attributes["spec"].as_string())
        layout = self.layout = node.attributes["layout"].as_string()
        x, scale, self.point = (*node.inputs, None)[:3]
        assert x is not None
        assert x.shape is not None
        assert scale is not None
        self.x, self.scale = x, scale
        extents = [dim if isinstance(dim, int) else None for dim in x.shape]
        try:
            self.edges: Edges = find_edges(extents, layout, self.spec.block)
        except ValueError as error:
            raise ExportError(f"export: {self.site}: {error}") from error

    def op(self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any) -> ir.Value:
        """One new node with one output, which it returns."""
        return self.ops(op_type, *inputs, name=name, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One new node in front of the stand-in; returns its outputs."""
        name = f"{self.site}/{name or op_type}"
        domain = DOMAIN if op_type in FUNCTIONS else ""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, made in enumerate(node.outputs):
            made.name = f"{name}:{index}"
        node.metadata_props["site"] = self.site
        self.graph.insert_before(self.node, node)
        return node.outputs

    def constant(self, name: str, numbers: ir.Tensor | np.ndarray) -> ir.Value:
        """An initializer."""
        return constant(self.graph, f"{self.site}/{name}", numbers)

    def ints(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """An initializer of int64."""
        return self.constant(name, np.array(numbers, np.int64))

    def float_input(self) -> ir.Value:
        """The tensor as float32."""
        return self.x if self.x.dtype == ir.DataType.FLOAT else self.shaped(self.op("Cast", self.x, name="Float", to=1))

    def shaped(self, made: ir.Value, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A value with the shape of the tensor, and a type."""
        made.type, made.shape = ir.TensorType(kind), self.x.shape
        return made

    def merged(self, x: ir.Value) -> ir.Value:
        """The tensor with the dimensions of `edges`, where blocks run over several as one."""
        if not self.edges.joined:
            return x
        shape = [extent if extent is not None else 0 for extent in self.edges.extents]
        return self.op("Reshape", x, self.ints("merged", shape), name="Merge")

    def unmerged(self, values: ir.Value) -> ir.Value:
        """The dimensions of the tensor again."""
        if not self.edges.joined:
            return values
        return self.op("Reshape", values, self.op("Shape", self.x), name="Unmerge")

    def along(self, numbers: np.ndarray, axis: int) -> np.ndarray:
        """One number, or one for each index of the only axis along which they change; −1 for none."""
        skip = [dim for dim in range(numbers.ndim) if dim != axis]
        return spread(self.edges, numbers, skip).reshape(() if axis < 0 else (-1,))


def constant(graph: ir.Graph, name: str, numbers: ir.Tensor | np.ndarray) -> ir.Value:
    """An initializer, which is made if there is none of that name."""
    if name not in graph.initializers:
        tensor = numbers if isinstance(numbers, ir.Tensor) else ir.Tensor(numbers)
        tensor.name = name
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(made)
    return graph.initializers[name]


def source(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, in front of those that onnxruntime moves DequantizeLinear over or leaves out."""
    node = None if value is None else value.producer()
    while node is not None and may_go(node):
        node = operand(node)
    return node


def operand(node: ir.Node) -> ir.Node | None:
    """The node that computes the first operand that is no constant."""
    operands = [one for one in node.inputs if one is not None and one.const_value is None]
    return operands[0].producer() if operands else None


def may_go(node: ir.Node) -> bool:
    """True for a node that onnxruntime moves quantizers over, or leaves out."""
    if node.op_type in _NEUTRAL:
        known = [one.const_value.numpy() for one in node.inputs if one is not None and one.const_value is not None]
        return len(known) == 1 and bool((known[0] == _NEUTRAL[node.op_type]).all())
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype
    return node.op_type in _MOVERS | _COPIES or (node.op_type in _JOINS and len(node.inputs) == 1)


def replace_node(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Puts nodes in place of one, the last of which returns what that did; all have its type, shape and metadata."""
    for one in made:
        one.outputs[0].type, one.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        one.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)


def negate_twice(value: ir.Value, name: str) -> list[ir.Node]:
    """−(−x): the same number to the bit, which no optimization of onnxruntime takes out or looks through."""
    turned = ir.node("Neg", [value], name=f"{name}/Turned")
    return [turned, ir.node("Neg", turned.outputs, name=f"{name}/Back")]


def put_behind(graph: ir.Graph, node: ir.Node) -> None:
    """Node → node and a barrier behind it."""
    bare = ir.node(node.op_type, node.inputs, node.attributes, name=node.name)
    replace_node(graph, node, [bare, *negate_twice(bare.outputs[0], str(node.name))])


def put_in_front(graph: ir.Graph, node: ir.Node) -> None:
    """A barrier in front of the first input of a node."""
    value = node.inputs[0]
    assert value is not None
    made = negate_twice(value, str(node.name))
    for one in made:
        one.outputs[0].type, one.outputs[0].shape = value.type, value.shape
        one.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    node.replace_input_with(0, made[-1].outputs[0])


def array(value: ir.Value | None) -> np.ndarray:
    """The numbers of a constant."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def factor(scale: np.ndarray) -> np.ndarray:
    """float32 factors of stored scales; see runtime/numbers/scales.py."""
    if scale.dtype != np.uint8:
        return scale.astype(np.float32)
    return np.ldexp(np.float32(1), scale.astype(np.int32) - 127).astype(np.float32)
