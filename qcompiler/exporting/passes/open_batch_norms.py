"""Batch norms behind a weight that functions decode, in a form that onnxruntime does not fold."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.exporting.edits import add_constant, read_array, replace_node
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import find_source


@dataclasses.dataclass(frozen=True)
class OpenBatchNorms:
    """Batch norm behind a convolution whose weight is decoded by functions → (−x) · (−α) + β′.

    α = γ/√(variance + ε) and β′ = β − mean · α are rounded as by torch's kernels; this is x · α + β′, with one rounding
    more than the fused sum. onnxruntime decodes such a weight when it loads the file, and folds the next nodes into the
    values, which are rounded once more: 3 times as many codes flipped (MobileNet, hfp8). A Neg stops that.

    1. A weight of DequantizeLinear is not decoded early, and nothing is folded into it: its norm stays.
    2. Models in float16, whose norms round far more, keep theirs.
    """

    name: ClassVar[str] = "open-batch-norms"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of batch norms."""
        norms = [node for node in subject.graph if node.op_type == "BatchNormalization" and _reads_decoded_layer(node)]
        for norm in norms:
            _open_norm(subject.graph, norm)
        return len(norms)


def _reads_decoded_layer(norm: ir.Node) -> bool:
    x = norm.inputs[0]
    layer = None if x is None or x.dtype != ir.DataType.FLOAT else x.producer()
    return layer is not None and layer.op_type in ("Conv", "ConvTranspose") and _is_decoded(layer.inputs[1])


def _is_decoded(weight: ir.Value | None) -> bool:
    """Return True if a weight is computed, by other than DequantizeLinear."""
    node = find_source(weight)
    return node is not None and node.op_type != "DequantizeLinear"


def _open_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """Write a batch norm as three nodes."""
    x = norm.inputs[0]
    assert x is not None
    assert x.shape is not None
    gamma, beta, mean, variance = (read_array(value) for value in norm.inputs[1:])
    inverse = torch.rsqrt(torch.from_numpy(variance + np.float32(norm.attributes.get_float("epsilon", 1e-5)))).numpy()
    alpha = gamma * inverse
    # rounded once, as by torch's kernels: the product of two float32 is exact in float64
    shifted = (beta.astype(np.float64) - mean.astype(np.float64) * alpha.astype(np.float64)).astype(np.float32)
    channels = (-1, *[1] * (x.shape.rank() - 2))
    scale = add_constant(graph, f"{norm.name}/negative_scale", (-alpha).reshape(channels))
    shift = add_constant(graph, f"{norm.name}/shift", shifted.reshape(channels))
    negative = ir.node("Neg", [x], name=f"{norm.name}/Neg")
    scaled = ir.node("Mul", [negative.outputs[0], scale], name=f"{norm.name}/Scale")
    total = ir.node("Add", [scaled.outputs[0], shift], name=f"{norm.name}/Shift")
    replace_node(graph, norm, [negative, scaled, total])
