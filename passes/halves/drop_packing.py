"""Codes that one half both makes and reads need no packing."""

import dataclasses
from typing import ClassVar, cast

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.edit import replace_node
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class DropPacking:
    """read(unpack(pack(codes))) → read(codes), in one half: what backward computes again it does not pack."""

    name: ClassVar[str] = "drop-packing"

    def __call__(self, halves: Halves) -> int:
        """Return the number of tensors that are no longer unpacked."""
        if halves.is_whole:
            return 0
        found = [
            node
            for half in halves.graphs
            for node in half.graph.find_nodes(op="call_function", target=ops.UNPACK)
            if _get_packed(node).target is ops.PACK
        ]
        for node in found:
            replace_node(node, cast(Node, get_argument(_get_packed(node), "codes")))
        return len(found)


def _get_packed(node: Node) -> Node:
    return cast(Node, get_argument(node, "packed"))
