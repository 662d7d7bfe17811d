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
from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.image_product import ImageProduct, read_image_product
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.patch_product import Forward, InputGradient, PatchProduct, WeightGradient
from qcompiler.passes.ir.strides import get_strides
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.windows import Geometry, read_geometry
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class LowerConvolutions:
    """convolution(dequantize(X), dequantize(W)) → convolve_codes(X, W), and both gradients, in both halves.

    1. Where a kernel reads images, the calls are `convolve_codes`, `convolve_input` and `convolve_gradient`.
    2. Elsewhere a product of patches: view(matmul_codes(patches(X), view(W))). A row of patches holds what one position
       reads; the code of zero stands outside of the tensor. The weight gradient is a product of the output gradient and
       the same patches, the input gradient one of patches of the output gradient. With a stride, one position holds the
       gradients of `stride` inputs a dimension, and zeros fill up the taps.
    3. The sum that makes the bias gradient stays a sum of floats.
    4. What is not lowered has the reason in its `Contraction`: groups, transposed convolutions, blocks within a sample.
    """

    name: ClassVar[str] = "lower-convolutions"
    execution: Execution = Execution.SIMULATE

    def __call__(self, halves: Halves) -> int:
        """Return the number of contractions that were lowered."""
        if self.execution is Execution.SIMULATE or halves.is_whole:
            return 0
        return lower_products(halves.graphs, self._lower_contraction, convolutions=True)

    def _lower_contraction(self, node: Node, fact: Contraction) -> str:
        tensors = _list_tensors(node)
        geometry = read_geometry(node, tuple(tuple(get_value(tensor).shape) for tensor in tensors))
        if isinstance(geometry, str):
            return geometry
        image = read_image_product(geometry, *tensors, _get_place(node))
        if isinstance(image, ImageProduct) and image.choose_kernel(_get_result(node).dtype, faster=False)[0]:
            return self._lower_image(node, fact, image)
        product = _read_product(geometry, *tensors, _get_place(node))
        return product if isinstance(product, str) else self._lower_patches(node, fact, product)

    def _lower_image(self, node: Node, fact: Contraction, product: ImageProduct) -> str:
        """Case 1: write a call, or return the reason why float is faster."""
        wanted = _get_result(node)
        kernel, reason = product.choose_kernel(wanted.dtype, faster=self.execution is Execution.AUTO)
        if not reason:
            _replace(node, product.insert(node, fact, _get_bias(node), kernel, wanted))
        return reason

    def _lower_patches(self, node: Node, fact: Contraction, product: PatchProduct) -> str:
        """Case 2: write a product of patches, or return the reason why there is none."""
        sizes = (product.left, product.right, product.length, _get_result(node).dtype)
        kernel, reason = choose_kernel(*sizes, faster=self.execution is Execution.AUTO, reuse=product.reuse)
        if not reason:
            _write_product(node, fact, product, kernel)
        return reason


def _list_tensors(node: Node) -> tuple[Node, Node, Node]:
    """Return input, weight and output, or the gradient of the output."""
    forward = node.target is aten.convolution.default
    tensors = (*node.args[:2], node) if forward else (*node.args[1:3], node.args[0])
    return cast(tuple[Node, Node, Node], tensors)


def _read_product(geometry: Geometry, x: Node, w: Node, y: Node, place: int | None) -> PatchProduct | str:
    """Return a contraction as a product of patches, or the reason why there is none."""
    if place is None:
        return _read_forward(geometry, x, w)
    return _read_input_gradient(geometry, w, y) if place == 0 else _read_weight_gradient(geometry, x, w, y)


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


def _get_place(node: Node) -> int | None:
    """Return which of its results a gradient is computed for: 0 for the input, 1 for the weight; None in forward."""
    if node.target is aten.convolution.default:
        return None
    return 0 if cast(list[bool], node.args[-1])[0] else 1


def _get_result(node: Node) -> torch.Tensor:
    value, place = cast(Any, get_value(node)), _get_place(node)
    return cast(torch.Tensor, value if place is None else value[place])


def _get_bias(node: Node) -> Node | None:
    return cast(Node | None, node.args[2]) if node.target is aten.convolution.default else None


def _write_product(node: Node, fact: Contraction, product: PatchProduct, kernel: str) -> None:
    """Write the product of patches in place of a contraction."""
    left, right = product.insert_codes(node)
    sides = (product.left, left), (product.right, right)
    made = insert_product(node, fact, *sides, _get_bias(node), kernel, _get_result(node).dtype)
    _replace(node, product.insert_result(node, made))


def _replace(node: Node, made: Node) -> None:
    """Make the readers of a contraction read a result, with the strides of the contraction."""
    result = _restore_strides(node, made)
    if _get_place(node) is None:
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
        replace_node(item, _insert_sum(node) if item.args[1] == 2 else result)


def _insert_sum(node: Node) -> Node:
    """Return the bias gradient."""
    grad = cast(Node, node.args[0])
    args = (grad, [0, *range(2, get_value(grad).ndim)])
    return insert_call(node.graph, aten.sum.dim_IntList, args, before=node, name=f"{node.name}_bias")
