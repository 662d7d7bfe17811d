"""Weights lie in the file as the kernels of onnxruntime for the contraction read weights."""

import dataclasses
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.edit import replace_node
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import get_dequantizer

#: shapes of the same elements, through which onnxruntime moves DequantizeLinear
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclasses.dataclass(frozen=True)
class TransposeWeights:
    """Transposes the codes of a matrix, and the scales.

    1. If only transpositions read the floats, and every contraction behind reads two quantized tensors of known
       scale: the codes are transposed, and the transpositions go.
    2. If contractions of matrices read the floats as right operand, and the other operand has no known scale: the codes
       are transposed, and a transposition behind the floats undoes that. onnxruntime makes a matrix of codes times
       floats a MatMulNBits, which by default rounds the floats to 8 bits; transpose-in-gemms prevents that.
    3. Any other matrix stays.
    """

    name: ClassVar[str] = "transpose-weights"

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of weights."""
        return sum(_transpose_weight(subject, quantizer) for quantizer in list_quantizers(subject.graph))


def _transpose_weight(subject: FrozenGraph, quantizer: Quantizer) -> bool:
    floats = [reader.floats for reader in quantizer.dequantizers]
    readers = [(source, reader) for source in floats for reader in source.users]
    layout = quantizer.layout
    if quantizer.tensor not in subject.known or not len(set(layout)) == len(layout) == 2 or not readers:
        return False
    if all(reader.target is aten.t.default for _, reader in readers):
        if not all(_reads_static(subject, user, view) for _, view in readers for user in view.users):
            return False
        _turn_codes(subject, quantizer)
        for source, view in readers:
            replace_node(view, source)
        return True
    if all(_is_right(reader, source) and not _reads_static(subject, reader, source) for source, reader in readers):
        _turn_codes(subject, quantizer)
        for source in floats:
            _insert_view(source)
        return True
    return False


def _insert_view(floats: Node) -> None:
    """Case 2: a transposition between floats and the readers."""
    with floats.graph.inserting_after(floats):
        view = floats.graph.call_function(aten.t.default, (floats,))
    infer_value(view)
    for reader in [reader for reader in floats.users if reader is not view]:
        reader.replace_input_with(floats, view)


def _turn_codes(subject: FrozenGraph, quantizer: Quantizer) -> None:
    """Transpose the codes and scales of a weight."""
    subject.order[quantizer.site] = (1, 0)
    point = quantizer.zero_point
    codes = _turn_constant(subject, quantizer, "codes", quantizer.tensor)
    scale = _turn_constant(subject, quantizer, "scale", quantizer.scale)
    zero_point = None if point is None else _turn_constant(subject, quantizer, "zero_point", point)
    quantizer.fix(codes, scale, zero_point, quantizer.spec, quantizer.layout[::-1])


def _turn_constant(subject: FrozenGraph, quantizer: Quantizer, name: str, node: Node) -> Node:
    value = cast(Tensor, subject.get_value(node))
    return subject.add_constant(value.t().contiguous(), f"{quantizer.site}#{name}.t")


def _reads_static(subject: FrozenGraph, contraction: Node, weight: Node) -> bool:
    """Return True if the other operand of a contraction is dequantized by a scale that is known, to float32."""
    for node in contraction.all_input_nodes:
        while node.target in _VIEWS:
            node = cast(Node, node.args[0])
        reader = get_dequantizer(node)
        if node is not weight and reader is not None:
            return subject.get_value(reader.scale) is not None and reader.dtype is torch.float32
    return False


def _is_right(contraction: Node, weight: Node) -> bool:
    """Return True if a contraction of matrices reads a weight as the right operand."""
    matrices = contraction.target in (aten.mm.default, aten.addmm.default)
    return matrices and contraction.all_input_nodes[-1] is weight
