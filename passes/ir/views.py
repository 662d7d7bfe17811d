"""Nodes that hold the elements of another node, arranged otherwise."""

from typing import Final, cast

import torch
from torch.fx import Node

from qcompiler.passes.ir.meta import get_value
from qcompiler.runtime import ops

aten = torch.ops.aten


VIEWS: Final = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,  # of a whole dimension: x[:, None] if that dimension is free
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten.contiguous.default,
        ops.LAY_OUT,
    }
)


#: torch computes the hash of an operator in Python
_VIEW_IDS: Final = frozenset(map(id, VIEWS))


def is_view(node: Node) -> bool:
    """True if the node holds the same elements as the first argument, arranged otherwise (copies included)."""
    if node.op != "call_function" or id(node.target) not in _VIEW_IDS:
        return False
    source = node.args[0]
    return isinstance(source, Node) and get_value(source).numel() == get_value(node).numel()


def list_views(root: Node) -> list[Node]:
    """Return a tensor and every view of it, views of views too."""
    found = [root]
    for node in found:
        found += [user for user in node.users if user not in found and is_view(user) and user.args[0] is node]
    return found


def list_readers(root: Node) -> list[Node]:
    """Return every node that reads a tensor, or a view of it, and is no view itself."""
    return [user for view in list_views(root) for user in view.users if not is_view(user)]


def view_root(node: Node) -> Node:
    """Return the tensor that a chain of views starts from."""
    while is_view(node):
        node = cast(Node, node.args[0])
    return node
