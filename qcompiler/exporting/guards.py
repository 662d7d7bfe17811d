"""Forms of nodes that onnxruntime's optimizations leave as they are, where those of others would change the numbers."""

from typing import Final

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.exporting.writer import array, constant, replace_node, source

_FOUR_BITS: Final = (ir.DataType.INT4, ir.DataType.UINT4)


def keep_products(graph: ir.Graph) -> None:
    """Makes x @ wᵀ, two-dimensional with stored codes w, a Gemm that transposes.

    Of a transposition in front onnxruntime makes one of the codes, and of the product a MatMulNBits, which rounds x to
    8 bits.
    """
    for product in [node for node in graph if node.op_type in ("MatMul", "Gemm")]:
        left, right, *bias = product.inputs
        turn = None if right is None else right.producer()
        floats = turn.inputs[0] if turn is not None and turn.op_type == "Transpose" else None
        stored = None if floats is None else floats.producer()
        if stored is not None and stored.op_type == "Cast":  # of a model in float16
            stored = None if stored.inputs[0] is None else stored.inputs[0].producer()
        if stored is None or stored.op_type != "DequantizeLinear" or left is None or left.shape is None:
            continue
        given = product.attributes
        if left.shape.rank() == 2 and not ("transB" in given and given["transB"].as_int()):
            made = ir.node("Gemm", [left, floats, *bias], {**given, "transB": 1}, name=product.name)
            replace_node(graph, product, [made])


def keep_clips(graph: ir.Graph) -> None:
    """Beside quantizers of 4 bits, makes each Clip a Max and a Min, and each Relu a Max.

    onnxruntime refuses Clips in front of such a quantizer. A Relu there it leaves out, whatever the zero point: where
    that is not the first code, half of the codes were wrong.
    """
    points = four_bit_points(graph)
    first = all((array(point) == (0 if point.dtype == ir.DataType.UINT4 else -8)).all() for point in points)
    for node in [node for node in graph if points and node.op_type in ("Clip", "Relu")[: 1 if first else 2]]:
        bounds = node.inputs[1:] if node.op_type == "Clip" else (_zero_like(graph, node),)
        made: list[ir.Node] = []
        for op_type, bound in zip(("Max", "Min"), (*bounds, None, None), strict=False):
            if bound is not None:
                last = made[-1].outputs[0] if made else node.inputs[0]
                made.append(ir.node(op_type, [last, bound], name=f"{node.name}/{op_type}"))
        if made:
            replace_node(graph, node, made)


def _zero_like(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """0 in the type of a node."""
    kind = node.outputs[0].dtype or ir.DataType.FLOAT
    return constant(graph, f"zero/{kind.name}", np.zeros((), kind.numpy()))


def four_bit_points(graph: ir.Graph) -> list[ir.Value]:
    """The zero points of the quantizers of 4 bits."""
    points = [node.inputs[2] for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2]
    return [point for point in points if point is not None and point.dtype in _FOUR_BITS]


def keep_layers(graph: ir.Graph) -> None:
    """Puts a relu between a Gemm and the Reshape behind it, where it gives the same.

    The rows of a linear layer are split before its relu. onnxruntime makes a Gemm and the quantizer behind it one
    integer product; it moves a quantizer over a view, but not over a relu and a view.
    """
    for relu in [node for node in graph if node.op_type in ("Relu", "Clip")]:
        view = None if relu.inputs[0] is None else relu.inputs[0].producer()
        rows = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
        layer = None if rows is None else rows.producer()
        if view is None or rows is None or layer is None or layer.op_type != "Gemm":
            continue
        first = ir.node(relu.op_type, [rows, *relu.inputs[1:]], relu.attributes, name=relu.name)
        last = ir.node("Reshape", [first.outputs[0], view.inputs[1]], view.attributes, name=view.name)
        replace_node(graph, relu, [first, last])
        first.outputs[0].shape = rows.shape


def keep_norms(graph: ir.Graph) -> None:
    """Writes batch norm as (−x) · (−α) + β′ behind a convolution whose weight is decoded by functions.

    α = γ/√(variance + ε) and β′ = β − mean · α are rounded as by torch's kernels; this is x · α + β′, with one rounding
    more than their fused sum. onnxruntime decodes such a weight when it loads the file, and folds what follows into its
    values, which are rounded once more: 3 times as many codes flipped (MobileNet, hfp8). It does not look behind a Neg.
    A weight of DequantizeLinear is not decoded early, and nothing is folded into it. Models in float16, whose norms
    round far more, keep theirs.
    """
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        x = norm.inputs[0]
        layer = None if x is None or x.dtype != ir.DataType.FLOAT else x.producer()
        if layer is not None and layer.op_type in ("Conv", "ConvTranspose") and _is_decoded(layer.inputs[1]):
            _open_norm(graph, norm)


def _is_decoded(weight: ir.Value | None) -> bool:
    """True where a weight is computed, by other than DequantizeLinear."""
    node = source(weight)
    return node is not None and node.op_type != "DequantizeLinear"


def _open_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """Batch norm as three nodes."""
    x = norm.inputs[0]
    assert x is not None
    assert x.shape is not None
    gamma, beta, mean, variance = (array(value) for value in norm.inputs[1:])
    inverse = torch.rsqrt(torch.from_numpy(variance + np.float32(norm.attributes.get_float("epsilon", 1e-5)))).numpy()
    alpha = gamma * inverse
    # rounded once, as by torch's kernels: the product of two float32 is exact in float64
    shifted = (beta.astype(np.float64) - mean.astype(np.float64) * alpha.astype(np.float64)).astype(np.float32)
    channels = (-1, *[1] * (x.shape.rank() - 2))
    scale = constant(graph, f"{norm.name}/negative_scale", (-alpha).reshape(channels))
    shift = constant(graph, f"{norm.name}/shift", shifted.reshape(channels))
    negative = ir.node("Neg", [x], name=f"{norm.name}/Neg")
    product = ir.node("Mul", [negative.outputs[0], scale], name=f"{norm.name}/Scale")
    total = ir.node("Add", [product.outputs[0], shift], name=f"{norm.name}/Shift")
    replace_node(graph, norm, [negative, product, total])
