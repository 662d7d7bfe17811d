"""Changes of an ONNX graph: constants, nodes in place of others, barriers.

A barrier is −(−x): the same number to the bit, which no optimization of onnxruntime takes out or looks through.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def add_constant(graph: ir.Graph, name: str, numbers: ir.Tensor | np.ndarray) -> ir.Value:
    """Return the initializer of a name; a new one if there is none."""
    if name not in graph.initializers:
        tensor = numbers if isinstance(numbers, ir.Tensor) else ir.Tensor(numbers)
        tensor.name = name
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(made)
    return graph.initializers[name]


def replace_node(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Put nodes in place of one, whose result the last of them returns; all get its type, shape and metadata."""
    for one in made:
        one.outputs[0].type, one.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        one.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)


def make_barrier(value: ir.Value, name: str) -> list[ir.Node]:
    """Return the nodes of a barrier, named after the node that it belongs to."""
    turned = ir.node("Neg", [value], name=f"{name}/Turned")
    return [turned, ir.node("Neg", turned.outputs, name=f"{name}/Back")]


def insert_barrier_behind(graph: ir.Graph, node: ir.Node) -> bool:
    """Put a barrier behind a node; return False if its own is there already."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.name == f"{node.name}/Turned":
        return False
    bare = ir.node(node.op_type, node.inputs, node.attributes, name=node.name)
    replace_node(graph, node, [bare, *make_barrier(bare.outputs[0], str(node.name))])
    return True


def insert_barrier_in_front(graph: ir.Graph, node: ir.Node) -> bool:
    """Put a barrier in front of the first input of a node; return False if its own is there already."""
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.name == f"{node.name}/Back":
        return False
    made = make_barrier(value, str(node.name))
    for one in made:
        one.outputs[0].type, one.outputs[0].shape = value.type, value.shape
        one.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    node.replace_input_with(0, made[-1].outputs[0])
    return True


def read_array(value: ir.Value | None) -> np.ndarray:
    """Return the numbers of a constant."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
