"""Make floats of codes where something computes with them first, so that few of them are alive at a time."""

import dataclasses
from typing import ClassVar

from torch.fx import Graph, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.views import list_readers, list_views
from qcompiler.runtime import ops

#: calls of kernels, which a compiler does not move
_CALLS = (ops.UNPACK_CODES, ops.DEQUANTIZE_BLOCKS)


@dataclasses.dataclass(frozen=True)
class SinkFloats:
    """floats = dequantize_blocks(codes), view(floats), …, reader(view) → …, floats, view(floats), reader(view).

    1. In the copy of a half that a compiler gets. The views of saved tensors stand at the head of backward, and the
       floats in front of them: the inputs of all GELU of a ViT-Tiny were alive at once, 75 MB in place of 6.
    2. With the floats go their views, and the codes that are unpacked for them alone.
    """

    name: ClassVar[str] = "sink-floats"

    def __call__(self, halves: Halves) -> int:
        """Return the number of nodes that were moved."""
        return sum(_sink_calls(half.graph) for half in halves.graphs)


def _sink_calls(graph: Graph) -> int:
    found = [node for target in _CALLS[::-1] for node in graph.find_nodes(op="call_function", target=target)]
    return sum(map(_sink_node, found))


def _sink_node(node: Node) -> int:
    """Move a node and its views in front of the first node that computes with them; return how many moved."""
    readers, moved = list_readers(node), 0
    if not readers:
        return 0
    first = min(readers)
    for one in reversed(list_views(node)):
        if one.next is not first:
            first.prepend(one)
            moved += 1
        first = one
    return moved
