"""Biases in an ONNX file: a part of the layer if an integer engine adds the same number, behind the layer otherwise."""

import dataclasses
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.edits import add_constant, make_barrier, replace_node
from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.origins import find_source

_LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})


@dataclasses.dataclass(frozen=True)
class SplitBiases:
    """layer(x, w, b) → layer(x, w) − (−b), if onnxruntime would round b.

    1. Input and weight are dequantized by known scales: onnxruntime makes the bias an integer, a multiple of s = scale
       of the input · scale of the weight. A bias that is one already (round-biases) stays. Another is subtracted with
       its sign turned: x − (−b) is x + b to the bit, and an Add would be moved into the layer again. The subject gets
       the names of these layers.
    2. The weight is a known float, the input dequantized: onnxruntime 1.31 rounds such a weight to 8 bits, with the
       bias, unless something is between the layer and the quantizer behind it. So the layer gets the difference too,
       or a barrier in its place.
    """

    name: ClassVar[str] = "split-biases"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of layers."""
        graph = subject.graph
        floats = [node for node in graph if node.op_type in _LAYERS and _has_float_weight(node) and not _is_split(node)]
        for node in floats:
            _split_bias(graph, node)
        rounded = [node for node in graph if node.op_type in _LAYERS and _would_round(node)]
        for node in rounded:
            _split_bias(graph, node)
        subject.float_biases += [str(node.name) for node in rounded]
        return len(floats) + len(rounded)


def _is_split(node: ir.Node) -> bool:
    """Return True if the difference, or the barrier, that this pass writes is behind a layer already."""
    names = [use.node.name for use in node.outputs[0].uses()]
    return names in ([f"{node.name}/Bias"], [f"{node.name}/Turned"])


def _has_float_weight(node: ir.Node) -> bool:
    """Return True for a known weight that is no DequantizeLinear's, behind an input that is."""
    x, weight, bias = (*node.inputs, None)[:3]
    at = find_source(weight)
    computed = bias is not None and bias.const_value is None
    return not computed and _read_scale(x) is not None and (at is None or at.op_type != "DequantizeLinear")


def _would_round(node: ir.Node) -> bool:
    """Return True if an engine would make the bias of a layer an integer, and it is none."""
    x, weight, bias = (*node.inputs, None, None)[:3]
    if bias is None or bias.const_value is None:
        return False
    x_scale, weight_scale = _read_scale(x), _read_scale(weight)
    numbers = bias.const_value.numpy()
    if x_scale is None or weight_scale is None or x_scale.size > 1:
        return False  # no engine has sums of one unit there
    fits = _get_beta(node) == 1 and weight_scale.size in (1, numbers.size)
    return not (fits and _is_integer(numbers, x_scale * weight_scale))


def _split_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Write a layer without bias, minus the bias with its sign turned; a barrier if that is zero, and would be cut."""
    x, weight, bias = (*node.inputs, None)[:3]
    bare = ir.node(node.op_type, [x, weight], node.attributes, name=node.name)
    if bias is None or bias.const_value is None or not bias.const_value.numpy().any():
        behind = make_barrier(bare.outputs[0], str(node.name))
    else:
        spread = (-1,) if node.op_type == "Gemm" else (-1, *[1] * (_get_rank(node) - 2))
        held = bias.const_value.numpy()
        numbers = (-held * held.dtype.type(_get_beta(node))).reshape(spread)
        negative = add_constant(graph, f"{node.name}/negative_bias", numbers)
        behind = [ir.node("Sub", [bare.outputs[0], negative], name=f"{node.name}/Bias")]
    replace_node(graph, node, [bare, *behind])


def _get_beta(node: ir.Node) -> float:
    """Return the factor of the bias of a Gemm."""
    return node.attributes.get_float("beta", 1.0)


def _get_rank(node: ir.Node) -> int:
    """Return the number of dimensions of the result of a layer."""
    shape = node.outputs[0].shape
    assert shape is not None
    return shape.rank()


def _is_integer(bias: np.ndarray, unit: np.ndarray) -> bool:
    """Return True if rounding the bias to whole units moves it by 1/64 of one at most, or by roundings of float32.

    A whole one comes back from float32 that much off: β = 3, behind a mean that is subtracted again, is known to 2^-23,
    in units of 10^-5 to 1/84. One that is not whole moves by up to 1/2.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        count = bias.astype(np.float64) / unit
        apart = np.abs(count - np.round(count))
    return bool(((apart <= np.maximum(2.0**-6, np.abs(count) * 2.0**-22)) & (np.abs(count) < 2**31)).all())


def _read_scale(value: ir.Value | None) -> np.ndarray | None:
    """Return the known scale of a dequantized value as float64: one number or one a channel; None for blocks."""
    node = find_source(value)
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    held = node.inputs[1].const_value
    return None if held is None or held.shape.rank() > 1 else held.numpy().astype(np.float64).reshape(-1)
