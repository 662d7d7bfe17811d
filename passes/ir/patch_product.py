"""A convolution of codes, or a gradient of one, as a product of matrices: what is read, and the views around it."""

import abc
import dataclasses
import math
from typing import Any

from torch.fx import Node

from qcompiler.passes.ir.code_matrix import CodeMatrix
from qcompiler.passes.ir.code_product import Side
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.windows import Geometry, Windows
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class PatchProduct(abc.ABC):
    """Both matrices, and the sizes that kernels go by."""

    geometry: Geometry
    left: Side
    right: Side
    #: products in a sum
    length: int
    #: products that read one element of the patches
    reuse: int

    @abc.abstractmethod
    def insert_codes(self, node: Node) -> tuple[Node, Node]:
        """Return both matrices of codes, in front of a node."""

    @abc.abstractmethod
    def insert_result(self, node: Node, product: Node) -> Node:
        """Return the result of the contraction, by views of the product."""


class Forward(PatchProduct):
    """[samples · positions, taps · in] × [taps · in, out]."""

    def insert_codes(self, node: Node) -> tuple[Node, Node]:
        """Return both matrices of codes, in front of a node."""
        weight = _insert_rows(node, self.right.tensor, self.geometry.taps, is_position=False)
        weight = _insert_views(node, weight, (aten.t.default,))
        return _insert_patches(node, self.left.tensor, self.geometry.forward), weight

    def insert_result(self, node: Node, product: Node) -> Node:
        """Return [samples, out, *space] of the product."""
        shape = [self.left.tensor.extent, *self.geometry.result, self.right.extent]
        return _insert_views(
            node, product, (aten.reshape.default, shape), (aten.permute.default, _put_second(self.geometry))
        )


class WeightGradient(PatchProduct):
    """[out, samples · positions] × [samples · positions, taps · in]."""

    def insert_codes(self, node: Node) -> tuple[Node, Node]:
        """Return both matrices of codes, in front of a node."""
        grad = _insert_rows(node, self.left.tensor, self.geometry.result, is_position=True)
        grad = _insert_views(node, grad, (aten.t.default,))
        return grad, _insert_patches(node, self.right.tensor, self.geometry.forward)

    def insert_result(self, node: Node, product: Node) -> Node:
        """Return [out, in, *taps] of the product."""
        taps = self.geometry.taps
        shape = [self.left.extent, *taps, self.right.extent // math.prod(taps)]
        return _insert_views(
            node, product, (aten.reshape.default, shape), (aten.permute.default, _put_second(self.geometry))
        )


class InputGradient(PatchProduct):
    """[samples · positions, turned taps · out] × [turned taps · out, stride · in]: a position holds `stride` inputs."""

    def insert_codes(self, node: Node) -> tuple[Node, Node]:
        """Return both matrices of codes, in front of a node."""
        given = {"codes": self.right.tensor.insert_codes(node), "stride": list(self.geometry.stride)}
        weight = insert_operator(node.graph, ops.TURN_TAPS, given, before=node, name=f"{node.name}_codes")
        return _insert_patches(node, self.left.tensor, self.geometry.backward), weight

    def insert_result(self, node: Node, product: Node) -> Node:
        """Return [samples, in, *space] of the product: the inputs of all positions side by side, without the border."""
        geometry, samples = self.geometry, self.left.tensor.extent
        dims, count, stride = len(geometry.taps), geometry.backward.count, geometry.stride
        channels = self.right.extent // math.prod(stride)
        pairs = [place for dim in range(dims) for place in (1 + dim, 1 + dims + dim)]
        whole = [t * s for t, s in zip(count, stride, strict=True)]
        spread = _insert_views(
            node,
            product,
            (aten.reshape.default, [samples, *count, *stride, channels]),
            (aten.permute.default, [0, 1 + 2 * dims, *pairs]),
            (aten.reshape.default, [samples, channels, *whole]),
        )
        return _insert_views(node, spread, *self._cut_border(whole))

    def _cut_border(self, whole: list[int]) -> list[tuple[Any, ...]]:
        """The slices from the first input to the last."""
        geometry = self.geometry
        starts = [p - s * t for p, s, t in zip(geometry.padding, geometry.stride, geometry.first, strict=True)]
        dims = zip(starts, geometry.space, whole, strict=True)
        return [
            (aten.slice.Tensor, 2 + dim, start, start + extent)
            for dim, (start, extent, length) in enumerate(dims)
            if extent != length
        ]


def _insert_views(node: Node, tensor: Node, *steps: tuple[Any, ...]) -> Node:
    """Return a tensor after some calls, in front of a node."""
    for target, *args in steps:
        tensor = insert_call(node.graph, target, (tensor, *args), before=node, name=f"{node.name}_codes")
    return tensor


def _insert_rows(node: Node, tensor: CodeMatrix, extents: tuple[int, ...], *, is_position: bool) -> Node:
    """Return [first · space, second] of a tensor if space is a position, or else [first, space · second]."""
    one, zero = (1,) * len(extents), (0,) * len(extents)
    windows = Windows(zero, extents, one, one, one) if is_position else Windows(zero, one, one, extents, one)
    return _insert_call(node, tensor, None, 1, windows)  # nothing lies outside, so no zero point is needed


def _insert_patches(node: Node, tensor: CodeMatrix, windows: Windows) -> Node:
    """Return the patches of a tensor whose free dimension are the samples, in front of a node."""
    return _insert_call(node, tensor, tensor.reader.zero_point, tensor.edge, windows)


def _insert_call(node: Node, tensor: CodeMatrix, zero_point: Node | None, edge: int, windows: Windows) -> Node:
    given = {
        "codes": tensor.insert_codes(node),
        "zero_point": zero_point,
        "spec": tensor.reader.text,
        "edge": edge,
        **windows.list_arguments(),
    }
    return insert_operator(node.graph, ops.PATCHES, given, before=node, name=f"{node.name}_patches")


def _put_second(geometry: Geometry) -> list[int]:
    """Return the order of [first, *space, last] with the last one second."""
    dims = len(geometry.taps)
    return [0, dims + 1, *range(1, dims + 1)]
