"""Compute both gradients of a convolution in one call, where both read the same gradient of the result."""

import dataclasses
import operator
from typing import ClassVar, cast

from torch.fx import GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class JoinGradients:
    """input gradient of (G, W) and weight gradient of (G, X) → convolution_backward(G, X, W), before a compiler.

    1. The inverse of `split-convolution-backward`, and bitwise the same. The kernel then reads G once, and no empty
       tensor in the place of X or W: the kernel would copy one whose memory format the compiler has not chosen.
    2. The call stands at the earlier place. What the later one reads moves there, if nothing of it needs the earlier.
    """

    name: ClassVar[str] = "join-gradients"

    def __call__(self, halves: Halves) -> int:
        """Return the number of calls that were joined with another."""
        return sum(_join_half(half) for half in halves.graphs)


def _join_half(half: GraphModule) -> int:
    """Join all pairs of one graph."""
    alone: dict[tuple[object, ...], Node] = {}
    joined = 0
    for node in half.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        if sum(_list_wanted(node)) != 1:
            continue
        other = alone.setdefault(_describe(node), node)
        if _list_wanted(node) != _list_wanted(other) and _move_operands(node, other):
            del alone[_describe(node)]
            _join(other, node)
            joined += 1
    return joined


def _list_wanted(node: Node) -> tuple[bool, bool]:
    """Return which of the input gradient and the weight gradient a call computes."""
    input_wanted, weight_wanted, _ = cast(list[bool], node.args[-1])
    return input_wanted, weight_wanted


def _describe(node: Node) -> tuple[object, ...]:
    """Return what two calls of one convolution have in common."""
    grad, x, weight, bias, *numbers, _ = node.args
    shapes = [tuple(get_value(cast(Node, operand)).shape) for operand in (x, weight)]
    return (_identify(cast(Node, grad)), *shapes, str(bias), str(numbers))


def _identify(grad: Node) -> object:
    """Return what is equal for the same floats: every reader has a dequantizer of its own."""
    return (grad.target, grad.args) if grad.target is ops.DEQUANTIZE else grad


def _move_operands(later: Node, earlier: Node) -> bool:
    """Move what the later call reads in front of the earlier one; return False if that needs the earlier call."""
    between, stack = set(), [node for node in later.all_input_nodes if earlier < node]
    while stack:
        node = stack.pop()
        if node is earlier:  # the later call reads a result of the earlier one
            return False
        if node not in between:
            between.add(node)
            stack += [source for source in node.all_input_nodes if earlier < source or source is earlier]
    for node in sorted(between):
        earlier.prepend(node)
    return True


def _join(earlier: Node, later: Node) -> None:
    """Let the earlier call compute both gradients."""
    of_input, of_weight = (earlier, later) if _list_wanted(earlier)[0] else (later, earlier)
    grad, _, weight, *rest, _ = of_input.args
    bias_wanted = [cast(list[bool], node.args[-1])[2] for node in (of_input, of_weight)]
    earlier.args = (grad, of_weight.args[1], weight, *rest, [True, True, any(bias_wanted)])
    infer_value(earlier)
    for item in list(later.users):
        assert item.target is operator.getitem
        item.replace_input_with(later, earlier)
    later.graph.erase_node(later)
