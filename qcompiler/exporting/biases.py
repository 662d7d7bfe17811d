"""Biases in an ONNX file: a part of their layer where an integer engine adds the same number, behind it elsewhere."""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.writer import constant, negate_twice, replace_node, source

_LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})


def split_biases(graph: ir.Graph) -> tuple[str, ...]:
    """Writes biases as a difference behind their layer where onnxruntime would round them; returns these layers.

    Where input and weight of a layer are dequantized by known scales, onnxruntime makes its bias an integer, a multiple
    of s = scale of the input · scale of the weight. A bias that is one already (passes/round_biases.py) stays. Another
    is subtracted with its sign turned: x − (−b) is x + b to the bit, and an Add would be moved into the layer again.

    A float weight between quantizers onnxruntime 1.31 rounds to 8 bits, with the bias. It does not where something is
    between the layer and the quantizer behind it, so such a layer gets the difference too, or two changes of sign.
    """
    for node in [node for node in graph if node.op_type in _LAYERS and _has_float_weight(node)]:
        _put_behind(graph, node)
    rounded = [node for node in graph if node.op_type in _LAYERS and _would_round(node)]
    for node in rounded:
        _put_behind(graph, node)
    return tuple(str(node.name) for node in rounded)


def _has_float_weight(node: ir.Node) -> bool:
    """True for a known weight that is no DequantizeLinear's, behind an input that is."""
    x, weight, bias = (*node.inputs, None)[:3]
    at = source(weight)
    computed = bias is not None and bias.const_value is None
    return not computed and _scale(x) is not None and (at is None or at.op_type != "DequantizeLinear")


def _would_round(node: ir.Node) -> bool:
    """True where an engine would make the bias of a layer an integer, and it is none."""
    x, weight, bias = (*node.inputs, None, None)[:3]
    if bias is None or bias.const_value is None:
        return False
    x_scale, weight_scale = _scale(x), _scale(weight)
    numbers = bias.const_value.numpy()
    if x_scale is None or weight_scale is None or x_scale.size > 1:
        return False  # no engine has sums of one unit there
    fits = _factor(node) == 1 and weight_scale.size in (1, numbers.size)
    return not (fits and _is_integer(numbers, x_scale * weight_scale))


def _put_behind(graph: ir.Graph, node: ir.Node) -> None:
    """Layer → layer without bias, minus the bias with its sign turned; −(−x) where that is zero, and would be cut."""
    x, weight, bias = (*node.inputs, None)[:3]
    bare = ir.node(node.op_type, [x, weight], node.attributes, name=node.name)
    if bias is None or bias.const_value is None or not bias.const_value.numpy().any():
        behind = negate_twice(bare.outputs[0], str(node.name))
    else:
        spread = (-1,) if node.op_type == "Gemm" else (-1, *[1] * (_rank(node) - 2))
        held = bias.const_value.numpy()
        numbers = (-held * held.dtype.type(_factor(node))).reshape(spread)
        negative = constant(graph, f"{node.name}/negative_bias", numbers)
        behind = [ir.node("Sub", [bare.outputs[0], negative], name=f"{node.name}/Bias")]
    replace_node(graph, node, [bare, *behind])


def _factor(node: ir.Node) -> float:
    """What a Gemm multiplies its bias by."""
    return node.attributes.get_float("beta", 1.0)


def _rank(node: ir.Node) -> int:
    """Dimensions of what a layer returns."""
    shape = node.outputs[0].shape
    assert shape is not None
    return shape.rank()


def _is_integer(bias: np.ndarray, unit: np.ndarray) -> bool:
    """True where rounding the bias to whole units moves it by 1/64 of one at most, or by roundings of float32.

    A whole one comes back from float32 that much off: β = 3, behind a mean that is subtracted again, is known to 2^-23,
    in units of 10^-5 to 1/84. One that is not whole moves by up to 1/2.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        count = bias.astype(np.float64) / unit
        apart = np.abs(count - np.round(count))
    return bool(((apart <= np.maximum(2.0**-6, np.abs(count) * 2.0**-22)) & (np.abs(count) < 2**31)).all())


def _scale(value: ir.Value | None) -> np.ndarray | None:
    """The known scale by which a value is dequantized, as float64: one number or one a channel; None for blocks."""
    node = source(value)
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    held = node.inputs[1].const_value
    return None if held is None or held.shape.rank() > 1 else held.numpy().astype(np.float64).reshape(-1)
