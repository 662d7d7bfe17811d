"""From stand-ins for quantizers to ONNX: each becomes stored codes, QuantizeLinear, or a local function."""

import dataclasses
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompiler.deploy.activations import activation_shift, write_dynamic, write_static
from qcompiler.deploy.blocks import Edges
from qcompiler.deploy.functions import DOMAIN, FUNCTIONS
from qcompiler.deploy.weights import shift_of, write_weight
from qcompiler.deploy.writer import Quantizer, replace_node

_FOUR_BITS: Final = (ir.DataType.INT4, ir.DataType.UINT4)


@dataclasses.dataclass(frozen=True)
class Exported:
    """One quantizer in the file."""

    site: str
    #: weight, static or dynamic
    kind: str
    #: the value that it reads, and the one that holds its codes; of a weight only these
    values: tuple[str, ...]
    edges: Edges
    #: what was added to the codes of a weight
    shift: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the metadata of the file."""
        return {"site": self.site, "kind": self.kind, "values": self.values, "shift": self.shift}


def lower(model: ir.Model, *, signed_weights: bool = False) -> list[Exported]:
    """Replaces every stand-in in place; returns the quantizers in graph order.

    Raises:
        ExportError: a format, a range or a block without a form in ONNX.
    """
    found = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "Quantize"]
    exported = [_lower(Quantizer(model.graph, node), signed_weights) for node in found]
    for node in [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]:
        _keep_transposed(model.graph, node)
    _open_clips(model.graph)
    RemoveUnusedNodesPass()(model)
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(used):
        function: ir.Function = ir.from_proto(FUNCTIONS[name].to_function_proto())
        function.opset_imports[""] = model.graph.opset_imports[""]  # one version in all of the file, as onnx asks
        model.functions[DOMAIN, name, ""] = function
    model.graph.opset_imports.pop(DOMAIN, None)
    if used:
        model.graph.opset_imports[DOMAIN] = 1
    return exported


def _lower(q: Quantizer, signed: bool) -> Exported:
    """The nodes of one quantizer, in place of its stand-in and of those that read it."""
    assert q.x.dtype is not None
    source, shift = str(q.x.name), 0
    if q.x.const_value is not None and not q.x.dtype.is_floating_point():
        shift = shift_of(q, signed=signed)
        kind, (codes, values) = "weight", write_weight(q, shift)
    elif q.scale.const_value is not None:
        shift = activation_shift(q)
        kind, (codes, values) = "static", write_static(q, shift)
    else:
        kind, (codes, values) = "dynamic", write_dynamic(q)
    for reader in [use.node for use in q.node.outputs[0].uses()]:
        _replace(q, reader, values)
    q.graph.remove(q.node, safe=True)
    held = (str(codes.name),) if kind == "weight" else (source, str(codes.name))
    return Exported(q.site, kind, held, q.edges, shift)


def _keep_transposed(graph: ir.Graph, product: ir.Node) -> None:
    """Makes x @ wᵀ, two-dimensional with stored codes w, a Gemm that transposes.

    Of a transposition in front onnxruntime makes one of the codes, and of the product a MatMulNBits, which rounds x to
    8 bits.
    """
    left, right, *bias = product.inputs
    turn = None if right is None else right.producer()
    floats = turn.inputs[0] if turn is not None and turn.op_type == "Transpose" else None
    source = None if floats is None else floats.producer()
    if source is None or source.op_type != "DequantizeLinear" or left is None or left.shape is None:
        return
    given = product.attributes
    if left.shape.rank() == 2 and not ("transB" in given and given["transB"].as_int()):
        made = ir.node("Gemm", [left, floats, *bias], {**given, "transB": 1}, name=product.name)
        replace_node(graph, product, [made])


def _open_clips(graph: ir.Graph) -> None:
    """Beside quantizers of 4 bits, makes each Clip a Max and a Min: onnxruntime 1.31 refuses Clips in front of one."""
    points = [node.inputs[2] for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2]
    if all(point is None or point.dtype not in _FOUR_BITS for point in points):
        return
    for node in [node for node in graph if node.op_type == "Clip"]:
        made: list[ir.Node] = []
        for op_type, bound in zip(("Max", "Min"), (*node.inputs[1:], None, None), strict=False):
            if bound is not None:
                last = made[-1].outputs[0] if made else node.inputs[0]
                made.append(ir.node(op_type, [last, bound], name=f"{node.name}/{op_type}"))
        if made:
            replace_node(graph, node, made)


def _replace(q: Quantizer, reader: ir.Node, values: ir.Value) -> None:
    """Puts the dequantized values in place of a stand-in that reads the codes."""
    kind = ir.DataType(reader.attributes["dtype"].as_int())
    if kind != ir.DataType.FLOAT:
        values = q.shaped(q.op("Cast", values, name=f"As{kind.name}", to=kind.value), kind)
    ir.convenience.replace_all_uses_with(reader.outputs[0], values, replace_graph_outputs=True)
    q.graph.remove(reader, safe=True)
