"""Writing the nodes of one quantizer into an ONNX graph: names that start with its site, in front of its stand-in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.blocks import Edges, find_edges, spread_scale
from qcompiler.exporting.edits import add_constant
from qcompiler.exporting.functions import DOMAIN, FUNCTIONS
from qcompiler.exporting.trace import ExportError
from qcompiler.runtime.spec import parse_spec


class StandIn:
    """A stand-in of a quantizer with all facts, and the nodes that are written in that place."""

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
        """Insert a new node with one output, and return that."""
        return self.ops(op_type, *inputs, name=name, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Insert a new node in front of the stand-in; return its outputs."""
        name = f"{self.site}/{name or op_type}"
        domain = DOMAIN if op_type in FUNCTIONS else ""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, made in enumerate(node.outputs):
            made.name = f"{name}:{index}"
        node.metadata_props["site"] = self.site
        self.graph.insert_before(self.node, node)
        return node.outputs

    def constant(self, name: str, numbers: ir.Tensor | np.ndarray) -> ir.Value:
        """Return an initializer."""
        return add_constant(self.graph, f"{self.site}/{name}", numbers)

    def ints(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Return an initializer of int64."""
        return self.constant(name, np.array(numbers, np.int64))

    def float_input(self) -> ir.Value:
        """Return the tensor as float32."""
        return self.x if self.x.dtype == ir.DataType.FLOAT else self.shaped(self.op("Cast", self.x, name="Float", to=1))

    def shaped(self, made: ir.Value, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a value with the shape of the tensor, and a type."""
        made.type, made.shape = ir.TensorType(kind), self.x.shape
        return made

    def merged(self, x: ir.Value) -> ir.Value:
        """Return the tensor with the dimensions of `edges`, if blocks run over several as one."""
        if not self.edges.joined:
            return x
        shape = [extent if extent is not None else 0 for extent in self.edges.extents]
        return self.op("Reshape", x, self.ints("merged", shape), name="Merge")

    def unmerged(self, values: ir.Value) -> ir.Value:
        """Return the dimensions of the tensor again."""
        if not self.edges.joined:
            return values
        return self.op("Reshape", values, self.op("Shape", self.x), name="Unmerge")

    def along(self, numbers: np.ndarray, axis: int) -> np.ndarray:
        """Return one number, or one for each index of the only axis along which they change; −1 for none."""
        skip = [dim for dim in range(numbers.ndim) if dim != axis]
        return spread_scale(self.edges, numbers, skip).reshape(() if axis < 0 else (-1,))


def to_factors(scale: np.ndarray) -> np.ndarray:
    """Return float32 factors of stored scales; see runtime/scales.py."""
    if scale.dtype != np.uint8:
        return scale.astype(np.float32)
    return np.ldexp(np.float32(1), scale.astype(np.int32) - 127).astype(np.float32)
