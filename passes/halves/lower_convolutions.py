"""Convolve codes as integers, where a kernel can."""

import dataclasses
import math
import operator
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.code_matrix import CodeMatrix, explain_runs, read_matrix
from qcompiler.passes.ir.code_product import Side, choose_kernel, insert_product, lower_products
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.patch_product import Forward, InputGradient, PatchProduct, WeightGradient
from qcompiler.passes.ir.strides import get_strides
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.windows import Geometry, read_geometry
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class LowerConvolutions:
    """convolution(dequantize(X), dequantize(W)) → view(matmul_codes(patches(X), view(W))), in both halves.

    1. Forward: a row of patches holds what one position reads. Outside of the tensor stands the code of zero.
    2. The weight gradient is the product of the output gradient and the same patches.
    3. The input gradient is a product of patches of the output gradient. With a stride, one position holds the
       gradients of `stride` inputs a dimension, and zeros fill up the taps.
    4. The sum that makes the bias gradient stays a sum of floats.
    5. What is not lowered has the reason in its `Contraction`: groups, transposed convolutions, blocks within a sample.
    """

    name: ClassVar[str] = "lower-convolutions"
    execution: Execution = Execution.SIMULATE

    def __call__(self, halves: Halves) -> int:
        """Return the number of contractions that were lowered."""
        if self.execution is Execution.SIMULATE or halves.is_whole:
            return 0
        return lower_products(halves.graphs, self._lower_contraction, convolutions=True)

    def _lower_contraction(self, node: Node, fact: Contraction) -> str:
        product = _read_product(node)
        chosen = product if isinstance(product, str) else self._choose_kernel(node, product)
        if isinstance(chosen, str):
            return chosen
        _write_product(node, fact, *chosen)
        return ""

    def _choose_kernel(self, node: Node, product: PatchProduct) -> tuple[PatchProduct, str] | str:
        """Return a product with the name of a kernel, or the reason why there is none."""
        faster, dtype = self.execution is Execution.AUTO, _get_result(node).dtype
        sizes = (product.left, product.right, product.length, dtype)
        kernel, reason = choose_kernel(*sizes, faster=faster, reuse=product.reuse)
        return reason or (product, kernel)


def _read_product(node: Node) -> PatchProduct | str:
    """Return a contraction as a product of patches, or the reason why there is none."""
    forward = node.target is aten.convolution.default
    x, w, y = (cast(Node, arg) for arg in ((*node.args[:2], node) if forward else (*node.args[1:3], node.args[0])))
    geometry = read_geometry(node, tuple(tuple(get_value(tensor).shape) for tensor in (x, w, y)))
    if isinstance(geometry, str):
        return geometry
    if forward:
        return _read_forward(geometry, x, w)
    return _read_input_gradient(geometry, w, y) if _get_place(node) == 0 else _read_weight_gradient(geometry, x, w, y)


def _read_forward(geometry: Geometry, x: Node, w: Node) -> PatchProduct | str:
    left, right = _read_whole(x, 0), _read_whole(w, 0)
    if isinstance(left, str) or isinstance(right, str):
        return _join_reasons(left, right)
    length = math.prod(get_value(w).shape[1:])
    sides = _repeat(left, geometry.forward.positions), Side(right, right.extent, right.edge)
    return Forward(geometry, *sides, length, reuse=right.extent)


def _read_weight_gradient(geometry: Geometry, x: Node, w: Node, y: Node) -> PatchProduct | str:
    left, right = _read_whole(y, 1), _read_whole(x, 0)
    if isinstance(left, str) or isinstance(right, str):
        return _join_reasons(left, right)
    if right.edge < right.extent:
        return f"the scale of block {right.reader.spec.block} changes along the summed axis"
    columns = math.prod(get_value(w).shape[1:])
    length = right.extent * geometry.forward.positions
    sides = Side(left, left.extent, left.edge), Side(right, columns, columns)
    return WeightGradient(geometry, *sides, length, reuse=left.extent)


def _read_input_gradient(geometry: Geometry, w: Node, y: Node) -> PatchProduct | str:
    left, right = _read_whole(y, 0), _read_whole(w, 1)
    if isinstance(left, str) or isinstance(right, str):
        return _join_reasons(left, right)
    reason = _explain_stride(geometry, right)
    if reason:
        return reason
    inputs, windows = math.prod(geometry.stride), geometry.backward
    columns = right.extent * inputs
    sides = _repeat(left, windows.positions), Side(right, columns, columns if inputs > 1 else right.edge)
    length = get_value(w).shape[0] * windows.reads
    return InputGradient(geometry, *sides, length, reuse=right.extent * math.prod(geometry.taps) // windows.reads)


def _read_whole(operand: Node, free: int) -> CodeMatrix | str:
    """Return an operand none of whose scales changes along the summed axes, or the reason why it is not one."""
    found = read_matrix(operand, free)
    return found if isinstance(found, str) else explain_runs(found) or found


def _explain_stride(geometry: Geometry, weight: CodeMatrix) -> str:
    """Say why the input gradient of a convolution with strides is no product of patches; empty: it is one."""
    if any(s > 1 and d > 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True)):
        return "no kernel computes the input gradient of a convolution with stride and dilation on codes"
    if math.prod(geometry.stride) > 1 and weight.edge < weight.extent:
        return "the scales of the weight change along the input channels of a convolution with a stride"
    filled = any(k % s for k, s in zip(geometry.taps, geometry.stride, strict=True))
    if filled and weight.reader.zero_point is not None:
        return "the weight of a convolution with a stride has a zero point, and zeros fill up its taps"
    if min(geometry.backward.count) < 1:
        return "the convolution reads no input"
    return ""


def _repeat(samples: CodeMatrix, positions: int) -> Side:
    """Return rows of patches: every position of a sample has the scale of the sample."""
    return Side(samples, samples.extent * positions, samples.edge * positions)


def _join_reasons(*sides: CodeMatrix | str) -> str:
    return next(side for side in sides if isinstance(side, str))


def _get_place(node: Node) -> int:
    """Return which of its results a gradient is computed for: 0 for the input, 1 for the weight."""
    return 0 if cast(list[bool], node.args[-1])[0] else 1


def _get_result(node: Node) -> torch.Tensor:
    value: Any = get_value(node)
    return cast(torch.Tensor, value if node.target is aten.convolution.default else value[_get_place(node)])


def _write_product(node: Node, fact: Contraction, product: PatchProduct, kernel: str) -> None:
    """Write the product of patches in place of a contraction."""
    forward = node.target is aten.convolution.default
    bias = cast(Node | None, node.args[2]) if forward else None
    left, right = product.insert_codes(node)
    sides = (product.left, left), (product.right, right)
    made = insert_product(node, fact, *sides, bias, kernel, _get_result(node).dtype)
    result = _restore_strides(node, product.insert_result(node, made))
    if forward:
        node.replace_all_uses_with(result)
    else:
        _replace_gradients(node, result)
    node.graph.erase_node(node)


def _restore_strides(node: Node, result: Node) -> Node:
    """Return a result with the strides of the contraction, which its readers expect."""
    wanted = _get_result(node)
    strides = tuple(stride for stride, extent in zip(wanted.stride(), wanted.shape, strict=True) if extent != 1)
    if get_strides(result) in (None, strides):
        return result
    args = (result, list(wanted.stride()))
    return insert_call(node.graph, ops.LAY_OUT, args, before=node, name=f"{node.name}_laid_out")


def _replace_gradients(node: Node, result: Node) -> None:
    """Make readers of the gradients read a result, and a sum as the bias gradient."""
    for item in list(node.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(_insert_sum(node) if item.args[1] == 2 else result)
        node.graph.erase_node(item)


def _insert_sum(node: Node) -> Node:
    """Return the bias gradient."""
    grad = cast(Node, node.args[0])
    args = (grad, [0, *range(2, get_value(grad).ndim)])
    return insert_call(node.graph, aten.sum.dim_IntList, args, before=node, name=f"{node.name}_bias")
