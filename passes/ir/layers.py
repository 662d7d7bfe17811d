"""The end of a layer: the batch norm and the relu behind a contraction or a residual sum, computed together."""

import operator
from collections.abc import Iterator
from typing import Final

from torch.fx import Graph, Node

from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.masks import is_masked_sum
from qcompiler.passes.ir.meta import get_input, get_value, is_backward, is_size, is_written_sum
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.passes.ir.walk import find_dequantizer

BATCH_NORMS: Final = frozenset(
    {
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.default,
        aten._batch_norm_with_update_functional.default,
        aten._batch_norm_no_update.default,
        aten.native_batch_norm.default,
    }
)
_RELUS: Final = frozenset({aten.relu.default, aten.hardtanh.default, aten.clamp_min.default})


def batch_norm_behind(node: Node) -> Node | None:
    """Return the batch norm that alone reads a product or a sum in forward, and of which only the result is read."""
    reader = _only_reader(node)
    if reader is None or reader.target not in BATCH_NORMS or reader.args[0] is not node:
        return None
    return reader if len(_list_results(reader)) == 1 else None


def layer_end(node: Node) -> Node:
    """Return the last node of the layer that starts with a contraction or a sum: behind one batch norm, then one relu.

    Each counts only as the one forward reader of the node before. The view that splits the rows of a linear layer,
    (N·T, C) to (N, T, C), counts as part of a relu behind the view.
    """
    norm = batch_norm_behind(node)
    node = node if norm is None else _list_results(norm)[0]
    reader = _only_reader(node)
    if reader is not None and _splits_rows(reader):
        reader = _only_reader(reader)
    return reader if reader is not None and reader.target in _RELUS else node


def residual_sums(graph: Graph) -> Iterator[Node]:
    """Forward sums of two floating tensors of one shape that both depend on the input of the model.

    Sums are those that the model writes: none inside of an interpolation or a recurrent cell, and none with a mask.
    """
    varies = _depends_on_input(graph)
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        terms = [term for term in node.args[:2] if isinstance(term, Node) and varies.get(term)]
        alike = len(terms) == 2 and all(get_value(term).shape == get_value(node).shape for term in terms)
        floating = get_value(node).is_floating_point() and get_value(node).ndim > 1
        if alike and floating and not is_backward(node) and is_written_sum(node) and not is_masked_sum(node):
            yield node


def end_layout(layout: str, end: Node) -> str:
    """Return the layout of a layer's end from that layout: split rows are several batch dimensions."""
    return "b" * (get_value(end).ndim - len(layout)) + layout


def sum_layout(node: Node) -> str:
    """Return the layout of a sum: the layout of a dequantized term, else batch, channels, and space behind."""
    for term in node.all_input_nodes:
        root = find_dequantizer(term)
        if root is not None and get_value(root.floats).shape == get_value(node).shape:
            return root.layout
    ndim = get_value(node).ndim
    return "bc" + "s" * (ndim - 2) if ndim != 3 else "bbc"


def _list_results(norm: Node) -> list[Node]:
    """Return the nodes that take the normalized tensor out of the results of a batch norm."""
    return [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]


def _splits_rows(view: Node) -> bool:
    """Return True if a view makes several dimensions of the first and keeps the others."""
    if not is_view(view) or view.target not in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return False
    before, after = get_value(view.all_input_nodes[0]).shape, get_value(view).shape
    return len(after) > len(before) > 1 and after[1 - len(before) :] == before[1:]


def _only_reader(node: Node) -> Node | None:
    """Return the one forward reader of a node, None if there are several; quantizers of the node do not count."""
    readers = [user for user in node.users if not is_backward(user) and user.op == "call_function"]
    return readers[0] if len(readers) == 1 else None


def _depends_on_input(graph: Graph) -> dict[Node, bool]:
    varies: dict[Node, bool] = {}
    for node in graph.nodes:
        fact = get_input(node) if node.op == "placeholder" else None
        given = fact is not None and fact.kind is InputKind.INPUT
        varies[node] = not is_size(node) and (given or any(varies[source] for source in node.all_input_nodes))
    return varies
