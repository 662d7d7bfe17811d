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
from qcompiler.passes.ir.views import aten, is_view
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
    #: how many indices along the summed dimension share a scale; 0: all of them
    run: int = 0
    #: True if the scales are in the order of runs, and not in that of the other indices
    turned: bool = False

    def insert_codes(self, before: Node) -> Node:
        """Return the same views of the codes, in front of a node."""
        made = self.reader.codes
        for view in self.views:
            args, name = (made, *view.args[1:]), f"{view.name}_codes"
            made = insert_call(before.graph, view.target, args, dict(view.kwargs), before=before, name=name)
        return made

    def insert_scale(self, before: Node) -> Node:
        """Return the scale, checked if the dequantizer shows what is not finite, in the order of rows."""
        scale = self._insert_checked(before)
        if not self.turned:
            return scale
        summed = get_value(self.reader.codes).numel() // self.extent
        shape = [-(-summed // self.run), -(-self.extent // self.edge)]
        steps = ((aten.reshape.default, shape), (aten.t.default,))
        for target, *args in steps:
            scale = insert_call(before.graph, target, (scale, *args), before=before, name=f"{before.name}_scale")
        return scale

    def _insert_checked(self, before: Node) -> Node:
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
    """Return what an operand is in codes, or the reason why scales are no grid over its rows and sums.

    Args:
        operand: a dequantizer of codes, or a view of one.
        free: the dimensions that are not summed: 0 of the left operand of a matrix product, 1 of the right one.
    """
    views = []
    while is_view(operand):
        views.append(operand)
        operand = cast(Node, operand.args[0])
    reader, chain = Dequantizer(operand), tuple(reversed(views))
    numbers = _number_scales(reader, chain, free)
    grid = _find_grid(numbers, f"block {reader.spec.block}")
    return grid if isinstance(grid, str) else CodeMatrix(reader, chain, numbers.shape[0], *grid)


def explain_runs(matrix: CodeMatrix) -> str:
    """Say that scales change along the summed axis, for products that have no kernel for that; empty: none does."""
    return f"the scale of block {matrix.reader.spec.block} changes along the summed axis" if matrix.run else ""


def _number_scales(reader: Dequantizer, views: Sequence[Node], free: tuple[int, ...]) -> torch.Tensor:
    """Return the number of the scale of every element, [free, summed]: the numbers take the way of the codes."""
    blocks = view_blocks(tuple(get_value(reader.codes).shape), reader.layout, reader.spec.block)
    numbers = blocks.spread(torch.arange(math.prod(blocks.counts), dtype=torch.int32).reshape(blocks.counts))
    for view in views:
        numbers = _view_numbers(view, numbers)
    return numbers.movedim(free, tuple(range(len(free)))).flatten(0, len(free) - 1).flatten(1)


def _view_numbers(view: Node, numbers: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, run_call(view, lambda _: numbers))


def _find_grid(numbers: torch.Tensor, block: str) -> tuple[int, int, bool] | str:
    """Return edge, run and order of a matrix of numbers (`CodeMatrix`), or the reason why it is no grid of blocks."""
    if not numbers.numel():
        return 1, 0, False
    first = numbers[0, 0]
    edge, run = int((numbers[:, 0] == first).sum()), int((numbers[0] == first).sum())
    grid = numbers[::edge, ::run]
    spread = grid.repeat_interleave(edge, 0)[: len(numbers)].repeat_interleave(run, 1)[:, : numbers.shape[1]]
    count = torch.arange(grid.numel(), dtype=torch.int32)
    if torch.equal(spread, numbers) and torch.equal(grid.flatten(), count):
        return edge, run if grid.shape[1] > 1 else 0, False
    if torch.equal(spread, numbers) and torch.equal(grid.t().flatten(), count):
        return edge, run, True
    if bool((numbers != numbers[:, :1]).any()):
        return f"the scale of {block} changes along the summed axis"
    return f"the scales of {block} are not in the order of its rows"
