"""From stand-ins for quantizers to ONNX: each becomes stored codes, QuantizeLinear, or a local function."""

import dataclasses
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompiler.exporting.activations import activation_shift, write_dynamic, write_static
from qcompiler.exporting.barriers import keep_float_kernels, keep_four_bits, keep_quantizers_apart
from qcompiler.exporting.blocks import Edges
from qcompiler.exporting.functions import DOMAIN, FUNCTIONS
from qcompiler.exporting.guards import keep_clips, keep_layers, keep_norms, keep_products
from qcompiler.exporting.weights import shift_of, write_weight
from qcompiler.exporting.writer import Quantizer


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
    #: True for a weight of 8 bits that was asked to stay int8; see shift_of
    saturates: bool = False

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
    keep_products(model.graph)
    keep_layers(model.graph)
    keep_clips(model.graph)
    keep_norms(model.graph)
    keep_four_bits(model.graph)
    keep_float_kernels(model.graph)
    keep_quantizers_apart(model.graph)
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
    source, shift, saturates = str(q.x.name), 0, False
    if q.x.const_value is not None and not q.x.dtype.is_floating_point():
        shift = shift_of(q)
        if signed and shift:
            shift, saturates = 0, True
        kind, (codes, values) = "weight", write_weight(q, shift)
    elif q.scale.const_value is not None:
        shift = activation_shift(q)
        kind, (codes, values) = "static", write_static(q, shift)
    else:
        kind, (codes, values) = "dynamic", write_dynamic(q)
    for reader in [use.node for use in q.node.outputs[0].uses()]:
        _replace(q, reader, values)
    q.graph.remove(q.node, safe=True)
    if q.x.dtype != ir.DataType.FLOAT:
        # onnxruntime computes float16 in float32, and does not round in front of this cast
        source = f"{q.site}/Float:0"
    held = (str(codes.name),) if kind == "weight" else (source, str(codes.name))
    return Exported(q.site, kind, held, q.edges, shift, saturates)


def _replace(q: Quantizer, reader: ir.Node, values: ir.Value) -> None:
    """Puts the dequantized values in place of a stand-in that reads the codes."""
    kind = ir.DataType(reader.attributes["dtype"].as_int())
    if kind != ir.DataType.FLOAT:
        values = q.shaped(q.op("Cast", values, name=f"As{kind.name}", to=kind.value), kind)
    ir.convenience.replace_all_uses_with(reader.outputs[0], values, replace_graph_outputs=True)
    q.graph.remove(reader, safe=True)
