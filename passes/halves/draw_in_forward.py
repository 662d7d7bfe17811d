"""Draw the random key of a step in forward alone."""

import dataclasses
from typing import ClassVar

from torch.fx import Graph, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.edit import add_output, insert_input, replace_node
from qcompiler.passes.ir.meta import copy_meta
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class DrawInForward:
    """backward: key = draw_key() → forward: key = draw_key(), saved; backward: key as an input.

    Backward that runs twice rounds alike then.
    """

    name: ClassVar[str] = "draw-in-forward"

    def __call__(self, halves: Halves) -> int:
        """Return the number of keys that moved."""
        if halves.forward is None or halves.backward is None:
            return 0
        keys = list(halves.backward.graph.find_nodes(op="call_function", target=ops.DRAW_KEY))
        for key in keys:
            _move_key(key, halves.forward.graph, halves.backward.graph)
        return len(keys)


def _move_key(key: Node, forward: Graph, backward: Graph) -> None:
    with forward.inserting_before(forward.output_node()):
        drawn = forward.node_copy(key)
    add_output(forward, drawn)
    with backward.inserting_before(_find_first_given(backward)):
        saved = insert_input(backward, key.name)
    copy_meta(key, saved)
    replace_node(key, saved)


def _find_first_given(backward: Graph) -> Node:
    """Return the first input of backward that forward does not save: the partitioner knows them by their names."""
    found: list[Node] = list(backward.find_nodes(op="placeholder"))
    return next(node for node in found if str(node.target).startswith("tangents"))
