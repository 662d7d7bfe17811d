"""Split the gradient of a convolution into its contractions, so that each can read its own quantized operands."""

import dataclasses
import operator
from typing import ClassVar, cast

from torch.fx import GraphModule, Node

from qcompiler.passes.graph import aten, insert_call, value


@dataclasses.dataclass(frozen=True)
class SplitConvolutionBackward:
    """convolution_backward(G, X, W, mask=[T, T, b]) → input gradient (mask [T, F, F]) and weight gradient ([F, T, b]).

    Bitwise the same: the kernels compute the two products one after the other in any case. Each product uses one of X
    and W for its shape only; there a broadcast scalar of that shape takes its place, so nothing else is kept alive.
    """

    name: ClassVar[str] = "split-convolution-backward"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of gradients that were rewritten."""
        changes = 0
        for node in module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
            changes += _split(node)
        return changes


def _split(node: Node) -> int:
    *head, mask = node.args
    dx, dw, db = cast(list[bool], mask)
    changed = 0
    if dx and dw:
        weight = insert_call(node.graph, node.target, (*head, [False, dw, db]), before=node)
        node.args = (*head, [True, False, False])
        for item in list(node.users):
            if item.target is operator.getitem and item.args[1] in (1, 2):
                item.replace_input_with(node, weight)
        _shape_only(weight, 2)
        _shape_only(node, 1)
        changed = 1
    elif dx or dw:
        changed = _shape_only(node, 1 if dx else 2)
    return changed


def is_shape_only(node: Node) -> bool:
    """True for the broadcast scalar that stands in for an operand of which only the shape is read."""
    source = node.args[0] if node.target is aten.expand.default else None
    return isinstance(source, Node) and source.target is aten.full.default


def _shape_only(node: Node, arg: int) -> int:
    source = node.args[arg]
    assert isinstance(source, Node)
    if is_shape_only(source):
        return 0
    like = value(source)
    options = {"dtype": like.dtype, "device": like.device}
    scalar = insert_call(node.graph, aten.full.default, ([1] * like.ndim, 0.0), options, before=node)
    wide = insert_call(node.graph, aten.expand.default, (scalar, list(like.shape)), before=node)
    node.update_arg(arg, wide)
    return 1
