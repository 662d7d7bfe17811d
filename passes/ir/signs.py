"""Which tensors of a graph are never negative, so that an unsigned format wastes no levels."""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from qcompiler.passes.ir.meta import get_value, has_value
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.passes.rules import Sign
from qcompiler.runtime import ops

#: the result is never negative, whatever goes in
_ALWAYS: Final = frozenset(
    {
        aten.relu.default,
        aten.relu_.default,
        aten.sigmoid.default,
        aten.hardsigmoid.default,
        aten._softmax.default,
        aten.exp.default,
        aten.abs.default,
        aten.softplus.default,
        aten.sqrt.default,
        aten.bernoulli.p,
        aten.rand_like.default,
    }
)
#: the result is never negative if none of the tensors that go in is
_WHERE_INPUTS_ARE: Final = frozenset(
    {
        aten.cat.default,
        aten.max_pool2d_with_indices.default,
        aten.avg_pool2d.default,
        aten._adaptive_avg_pool2d.default,
        aten.mean.dim,
        aten.upsample_nearest2d.vec,
        aten.slice.Tensor,
        aten.select.int,
        aten._to_copy.default,
        aten.native_dropout.default,
    }
)
#: clamps to [second argument, third argument]
_CLAMPS: Final = frozenset({aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default})


class Signs:
    """The signs of the tensors of one graph, each found once: a network of sums asks for the same ones again."""

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Node, bool] = {}
        for node in graph.nodes:  # from the front, so that long chains need no deep recursion
            self.is_nonnegative(node)

    def find(self, tensor: Node) -> Sign:
        """Return the sign of a tensor, as rules ask for it."""
        return Sign.NONNEGATIVE if self.is_nonnegative(tensor) else Sign.SIGNED

    def is_nonnegative(self, node: Any) -> bool:
        """Return True if no value of the tensor can be below zero (NaN aside), by the operators that made the tensor.

        Numbers count by themselves. False if nothing is known: for inputs, parameters and every other operator. Nodes
        that are written later may be asked for too.
        """
        if isinstance(node, int | float):
            return bool(node >= 0)
        if not isinstance(node, Node) or node.op != "call_function":
            return False
        if node not in self._known:
            self._known[node] = _decide(node, self.is_nonnegative)
        return self._known[node]


def _decide(node: Node, is_nonnegative: Callable[[Any], bool]) -> bool:
    """Return the answer for a call from the answers for its arguments."""
    if node.target in _ALWAYS:
        return True
    if node.target in _CLAMPS:
        low = node.args[1] if len(node.args) > 1 else None
        return isinstance(low, int | float) and bool(low >= 0)
    if node.target is operator.getitem:
        return bool(node.args[1] == 0) and is_nonnegative(node.args[0])
    if node.target in (ops.DEQUANTIZE, ops.QUANTIZE) or is_view(node):
        return is_nonnegative(node.args[0])
    if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return all(map(is_nonnegative, node.args[:2]))
    if node.target in _WHERE_INPUTS_ARE:
        return all(map(is_nonnegative, node.all_input_nodes))
    return has_value(node) and getattr(get_value(node), "dtype", None) is torch.bool  # several results have no dtype
