"""Split the gradient of a convolution into contractions, so that each can read other quantized operands."""

import dataclasses
import operator
from typing import ClassVar, cast

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.stand_in import stand_in
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
        stand_in(weight, 2)
        stand_in(node, 1)
        changed = 1
    elif dx or dw:
        changed = stand_in(node, 1 if dx else 2)
    return changed
