"""Split the gradient of a convolution into contractions, so that each can read other quantized operands."""

import dataclasses
import operator
from typing import ClassVar, cast

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import infer_value, insert_call
from qcompiler.passes.ir.meta import get_value, pin_to_backward
from qcompiler.passes.ir.views import aten


@dataclasses.dataclass(frozen=True)
class SplitConvolutionBackward:
    """convolution_backward(G, X, W, mask=[T, T, b]) → input gradient (mask [T, F, F]) and weight gradient ([F, T, b]).

    Bitwise the same: the kernels compute the two contractions one after the other in any case. Each contraction uses
    one of X and W for shape and strides only. An empty tensor of that shape and those strides takes its place, so
    nothing else is kept alive. The kernels choose the memory format of the result by the strides of both operands.
    """

    name: ClassVar[str] = "split-convolution-backward"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of gradients that were rewritten."""
        changes = 0
        for node in module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
            changes += _split_gradient(node)
        return changes


def _split_gradient(node: Node) -> int:
    *head, mask = node.args
    dx, dw, db = cast(list[bool], mask)
    changed = 0
    if dx and dw:
        weight = insert_call(node.graph, node.target, (*head, [False, dw, db]), before=node)
        node.args = (*head, [True, False, False])
        infer_value(node)
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
    """Return True for the empty tensor that stands in for an operand of which only shape and strides are read."""
    return node.target is aten.empty_strided.default


def _shape_only(node: Node, arg: int) -> int:
    source = node.args[arg]
    assert isinstance(source, Node)
    if is_shape_only(source):
        return 0
    like = get_value(source)
    options = {"dtype": like.dtype, "device": like.device}
    empty = insert_call(node.graph, aten.empty_strided.default, (list(like.shape), like.stride()), options, before=node)
    pin_to_backward(empty)
    node.update_arg(arg, empty)
    return 1
