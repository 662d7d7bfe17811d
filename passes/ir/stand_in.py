"""Empty tensors in place of tensors of which an operator reads only shape and strides."""

from torch.fx import Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import get_value, pin_to_backward
from qcompiler.passes.ir.views import aten


def is_stand_in(node: Node) -> bool:
    """Return True for the empty tensor that stands in for an operand of which only shape and strides are read."""
    return node.target is aten.empty_strided.default


def stand_in(node: Node, arg: int) -> int:
    """Let a node of backward read an empty tensor as its argument `arg`; return 0 if the node does already."""
    source = node.args[arg]
    assert isinstance(source, Node)
    if is_stand_in(source):
        return 0
    like = get_value(source)
    options = {"dtype": like.dtype, "device": like.device}
    empty = insert_call(node.graph, aten.empty_strided.default, (list(like.shape), like.stride()), options, before=node)
    pin_to_backward(empty)
    node.update_arg(arg, empty)
    return 1
