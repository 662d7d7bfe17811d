"""A convolution of codes, or a gradient of one, by a kernel that reads the image itself."""

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Target

from qcompiler.passes.ir.code_matrix import explain_runs, read_matrix
from qcompiler.passes.ir.code_product import Side, choose_kernel, insert_product
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.windows import Geometry
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class ImageProduct:
    """Both tensors, and what kernels and the operator are told."""

    target: Target
    #: the side that is read through windows: left or right
    image: str
    #: a run is counted in channels, rows or samples: whichever dimension is summed
    left: Side
    right: Side
    #: products in a sum
    length: int
    #: products in a sum for each index of the summed dimension
    inner: int
    #: further arguments of the operator
    arguments: dict[str, Any]

    def choose_kernel(self, dtype: torch.dtype, *, faster: bool) -> tuple[str, str]:
        """Return the name of a kernel and an empty string, or an empty name and the reason why there is none."""
        sizes = self.left, self.right, self.length, dtype
        return choose_kernel(*sizes, faster=faster, image=self.image, inner=self.inner)

    def insert(self, node: Node, fact: Contraction, bias: Node | None, kernel: str, wanted: torch.Tensor) -> Node:
        """Return the result in the memory order of a tensor, in front of a node."""
        left, right = (_insert_bytes(node, side.tensor.insert_codes(node)) for side in (self.left, self.right))
        given = {**self.arguments, "channels_last": wanted.stride(1) < wanted.stride(-1)}
        sides = (self.left, left), (self.right, right)
        return insert_product(node, fact, *sides, bias, kernel, wanted.dtype, self.target, given)


def _insert_bytes(node: Node, codes: Node) -> Node:
    """Return codes of one byte: `unpack` makes int32, which a compiler would write to memory for a kernel."""
    if get_value(codes).element_size() == 1:
        return codes
    args = (codes, torch.int8)
    return insert_call(
        node.graph, torch.ops.prims.convert_element_type.default, args, before=node, name=f"{codes.name}_bytes"
    )


def read_image_product(geometry: Geometry, x: Node, w: Node, y: Node, place: int | None) -> ImageProduct | str:
    """Return a convolution as kernels of images compute it, or the reason why scales or sizes do not allow that.

    Args:
        place: which gradient: 0 of the input, 1 of the weight; None: forward.
    """
    if place is None:
        return _read_forward(geometry, x, w)
    return _read_input(geometry, w, y) if place == 0 else _read_weight(geometry, x, w, y)


def _read_forward(geometry: Geometry, x: Node, w: Node) -> ImageProduct | str:
    taps, positions = math.prod(geometry.taps), geometry.forward.positions
    left, right = _read_side(x, 0, positions, math.prod(geometry.space)), _read_side(w, 0, 1, taps)
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    windows = geometry.forward.list_arguments()
    del windows["taps"]  # those of the weight
    return ImageProduct(ops.CONVOLVE_CODES, "left", left, right, _count_summed(w, 0), taps, windows)


def _read_input(geometry: Geometry, w: Node, y: Node) -> ImageProduct | str:
    taps, positions = math.prod(geometry.taps), geometry.forward.positions
    left, right = _read_side(y, 0, math.prod(geometry.space), positions), _read_side(w, 1, 1, taps)
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    if any(s > 1 and d > 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True)):
        return "no kernel computes the input gradient of a convolution with stride and dilation on codes"
    names = ("stride", "padding", "dilation", "space")
    given = {name: list(getattr(geometry, name)) for name in names}
    return ImageProduct(ops.CONVOLVE_INPUT, "left", left, right, _count_summed(w, 1), taps, given)


def _read_weight(geometry: Geometry, x: Node, w: Node, y: Node) -> ImageProduct | str:
    taps, positions = math.prod(geometry.taps), geometry.forward.positions
    left, right = _read_side(y, 1, 1, positions), _read_side(x, 1, taps, math.prod(geometry.space))
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    if right.tensor.reader.zero_point is not None and right.edge < right.tensor.extent:
        return f"the zero point of block {right.tensor.reader.spec.block} changes along the channels"
    given = geometry.forward.list_arguments()
    return ImageProduct(ops.CONVOLVE_GRADIENT, "right", left, right, _count_summed(y, 1), positions, given)


def _read_side(operand: Node, free: int, times: int, inner: int) -> Side | str:
    """Return an operand, whose scales may change with the index that is summed, but not within `inner` elements.

    Args:
        free: the dimension that is not summed.
        times: elements of the result for each index of that.
    """
    matrix = read_matrix(operand, free)
    if isinstance(matrix, str):
        return matrix
    if matrix.run % inner:
        return explain_runs(matrix)
    if matrix.run and matrix.reader.zero_point is not None:
        return f"the zero point of block {matrix.reader.spec.block} changes along the summed axis"
    return Side(matrix, matrix.extent * times, matrix.edge, matrix.run // inner)


def _count_summed(tensor: Node, free: int) -> int:
    shape = get_value(tensor).shape
    return math.prod(shape) // max(1, shape[free])
