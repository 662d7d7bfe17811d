"""From stand-ins for quantizers to ONNX: each becomes stored codes, QuantizeLinear, or a local function."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.activations import get_activation_shift, write_dynamic, write_static
from qcompiler.exporting.exported_model import ExportedModel, ExportedQuantizer
from qcompiler.exporting.functions import DOMAIN
from qcompiler.exporting.weights import get_weight_shift, write_weight
from qcompiler.exporting.writer import StandIn


@dataclasses.dataclass(frozen=True)
class LowerQuantizers:
    """Scale, ZeroPoint, Quantize and Dequantize of our domain → operators of ONNX and functions of them.

    1. A quantizer of constant codes is a weight: stored integers, and one DequantizeLinear if ONNX has its blocks.
    2. A quantizer with a constant scale has a known range: QuantizeLinear and DequantizeLinear, or functions.
    3. Any other measures its tensor: functions.

    Raises:
        ExportError: a format, a range or a block without a form in ONNX.
    """

    name: ClassVar[str] = "lower-quantizers"
    #: weights of 8 bits stay int8, though kernels of some CPUs saturate
    signed_weights: bool = False

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of quantizers."""
        stand_ins = [node for node in subject.graph if node.domain == DOMAIN and node.op_type == "Quantize"]
        made = [_lower_stand_in(StandIn(subject.graph, node), self.signed_weights) for node in stand_ins]
        subject.quantizers += made
        return len(made)


def _lower_stand_in(q: StandIn, signed: bool) -> ExportedQuantizer:
    """Write the nodes of one quantizer in place of its stand-in and of those that read it."""
    assert q.x.dtype is not None
    source, shift, saturates = str(q.x.name), 0, False
    if q.x.const_value is not None and not q.x.dtype.is_floating_point():
        shift = get_weight_shift(q)
        if signed and shift:
            shift, saturates = 0, True
        kind, (codes, values) = "weight", write_weight(q, shift)
    elif q.scale.const_value is not None:
        shift = get_activation_shift(q)
        kind, (codes, values) = "static", write_static(q, shift)
    else:
        kind, (codes, values) = "dynamic", write_dynamic(q)
    for reader in [use.node for use in q.node.outputs[0].uses()]:
        _replace_reader(q, reader, values)
    q.graph.remove(q.node, safe=True)
    if q.x.dtype != ir.DataType.FLOAT:
        # onnxruntime computes float16 in float32, and does not round in front of this cast
        source = f"{q.site}/Float:0"
    held = (str(codes.name),) if kind == "weight" else (source, str(codes.name))
    return ExportedQuantizer(q.site, kind, held, q.edges, shift, saturates)


def _replace_reader(q: StandIn, reader: ir.Node, values: ir.Value) -> None:
    """Put the dequantized values in place of a stand-in that reads the codes."""
    kind = ir.DataType(reader.attributes["dtype"].as_int())
    if kind != ir.DataType.FLOAT:
        values = q.shaped(q.op("Cast", values, name=f"As{kind.name}", to=kind.value), kind)
    ir.convenience.replace_all_uses_with(reader.outputs[0], values, replace_graph_outputs=True)
    q.graph.remove(reader, safe=True)
