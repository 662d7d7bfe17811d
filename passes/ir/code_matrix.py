"""An operand of a contraction as codes: the views between both, and the indices that share a scale."""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Node

from qcompiler.passes.ir.arguments import pack_arguments, run_call
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import Dequantizer, insert_operator
from qcompiler.passes.ir.views import is_view
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import view_blocks


@dataclasses.dataclass(frozen=True)
class CodeMatrix:
    """A matrix, or a tensor, of floats that codes were turned back into."""

    reader: Dequantizer
    #: from the dequantizer to the operand, in order
    views: tuple[Node, ...]
    #: indices along the dimensions that are not summed
    extent: int
    #: how many of these indices share a scale; all of them with one scale a tensor
    edge: int

    def insert_codes(self, before: Node) -> Node:
        """Return the same views of the codes, in front of a node."""
        made = self.reader.codes
        for view in self.views:
            args, name = (made, *view.args[1:]), f"{view.name}_codes"
            made = insert_call(before.graph, view.target, args, dict(view.kwargs), before=before, name=name)
        return made

    def insert_scale(self, before: Node) -> Node:
        """Return the scale, checked if the dequantizer shows what is not finite."""
        reader = self.reader
        if reader.shown is None:
            return reader.scale
        given = {"scale": reader.scale, "x": reader.shown, "spec": reader.text, "layout": reader.layout}
        args = pack_arguments(ops.CHECKED, given)
        known = [user for user in reader.scale.users if user.target is ops.CHECKED and user.args == args]
        ready = [node for node in known if node < before]
        if ready:
            return ready[0]
        name = f"{reader.floats.name}_checked"
        return insert_operator(before.graph, ops.CHECKED, given, before=before, name=name)


def read_matrix(operand: Node, *free: int) -> CodeMatrix | str:
    """Return what an operand is in codes, or the reason why no scale can stand in front of the sum.

    Args:
        operand: a dequantizer of codes, or a view of one.
        free: the dimensions that are not summed: 0 of the left operand of a matrix product, 1 of the right one.
    """
    views = []
    while is_view(operand):
        views.append(operand)
        operand = cast(Node, operand.args[0])
    reader, chain = Dequantizer(operand), tuple(reversed(views))
    shape = get_value(chain[-1] if chain else operand).shape
    extent = math.prod(shape[dim] for dim in free)
    edge = _find_edge(reader, chain, free)
    return edge if isinstance(edge, str) else CodeMatrix(reader, chain, extent, edge)


def _view_numbers(view: Node, numbers: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, run_call(view, lambda _: numbers))


def _find_edge(reader: Dequantizer, views: Sequence[Node], free: tuple[int, ...]) -> int | str:
    """Return how many indices along `free` share a scale.

    The scales are numbered, and the numbers take the way of the codes.
    """
    shape, spec = tuple(get_value(reader.codes).shape), reader.spec
    blocks = view_blocks(shape, reader.layout, spec.block)
    count = math.prod(blocks.counts)
    numbers = blocks.spread(torch.arange(count, dtype=torch.int32).reshape(blocks.counts))
    for view in views:
        numbers = _view_numbers(view, numbers)
    runs = numbers.movedim(free, tuple(range(len(free)))).flatten(0, len(free) - 1).flatten(1)
    if runs.numel() and bool((runs != runs[:, :1]).any()):
        return f"the scale of block {spec.block} changes along the summed axis"
    rows = runs[:, 0] if runs.numel() else runs.new_zeros(0)
    edge = max(1, int((rows == 0).sum()))
    if not torch.equal(rows, torch.arange(len(rows), dtype=torch.int32) // edge):
        return f"the scales of block {spec.block} are not in the order of its rows"
    return edge
