"""Make the comparisons of backward in forward, and save them as bits: codes would change them beside the limit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.arguments import get_argument, get_arguments
from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.meta import find_value
from qcompiler.passes.ir.saved_floats import iterate_saved
from qcompiler.passes.ir.saved_reads import MASKED, list_dependents, list_gradients
from qcompiler.passes.ir.views import aten
from qcompiler.passes.rules import Rule, saves_floats
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class SaveMasks:
    """backward: dX = G where X > 0 → forward saves the bits of X > 0, for floats that are saved as codes.

    1. Gradients of relu, leaky relu, prelu, hardtanh and shrinks are written out: a comparison, and a choice.
    2. Every comparison of backward that reads such a float, on the way perhaps a norm or a relu that backward computes
       again, is made in forward. One bit an element is saved, and exact.
    3. Does not fire without a rule of the role *saved*, or for floats that stay in float.
    """

    name: ClassVar[str] = "save-masks"
    rules: tuple[Rule, ...] = ()

    def __call__(self, halves: Halves) -> int:
        """Return the number of gradients that are written out, and of comparisons that forward makes."""
        if halves.forward is None or halves.backward is None or not saves_floats(self.rules):
            return 0
        table = SavedTable(halves)
        found = iterate_saved(table.inputs, self.rules, masks_follow=True)
        coded = list_dependents(table.inputs[one.node] for one in found if one.spec is not None)
        gradients = list_gradients(table.backward)
        written = [node for node in table.backward.nodes if node.target in MASKED and _reads_codes(node, coded)]
        for node in written:
            coded |= _WRITERS[node.target](node)
        table.backward.eliminate_dead_code()
        masks = [node for node in table.backward.nodes if node in coded - gradients and _is_last_mask(node, gradients)]
        for mask in masks:
            mask.replace_all_uses_with(table.take(_copy_to_forward(table, mask)))
        table.backward.eliminate_dead_code()
        table.drop_unread()
        table.write()
        return len(written) + len(masks)


def _reads_codes(node: Node, coded: set[Node]) -> bool:
    return get_argument(node, "self") in coded


def _is_mask(node: Node) -> bool:
    value = find_value(node)
    computed = node.op == "call_function" and node.target is not ops.UNPACK
    return computed and isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_last_mask(node: Node, gradients: set[Node]) -> bool:
    """Return True for a mask that something else than a further mask reads."""
    return _is_mask(node) and any(user in gradients or not _is_mask(user) for user in node.users)


def _copy_to_forward(table: SavedTable, node: Node) -> Node:
    """Return the node of forward that computes the same as one of backward: a known one, or a copy of the way to it."""
    known = {given: saved for saved, given in table.inputs.items()}
    if node in known:
        found: Node = known[node]
        return found
    (output,) = table.forward.find_nodes(op="output")
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: _copy_to_forward(table, one))
    equal = [user for one in _list_nodes(args) for user in one.users if user.target is node.target]
    for user in equal:
        if user.args == args and user.kwargs == kwargs:
            return user
    return insert_call(table.forward, node.target, args, dict(kwargs), before=output)


def _list_nodes(args: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(args, found.append)
    return found[:1]


def _write_threshold(node: Node) -> set[Node]:
    grad, x, limit = get_arguments(node, "grad_output", "self", "threshold")
    return _fill(node, grad, [(aten.le.Scalar, (x, limit))])


def _write_hardtanh(node: Node) -> set[Node]:
    grad, x, low, high = get_arguments(node, "grad_output", "self", "min_val", "max_val")
    return _fill(node, grad, [(aten.le.Scalar, (x, low)), (aten.ge.Scalar, (x, high))])


def _write_shrink(node: Node) -> set[Node]:
    grad = node.args[0]
    x, limit = get_arguments(node, "self", "lambd")
    size = insert_call(node.graph, aten.abs.default, (x,), before=node)
    return _fill(node, grad, [(aten.le.Scalar, (size, limit))]) | {size}


def _write_leaky(node: Node) -> set[Node]:
    grad, x, slope = get_arguments(node, "grad_output", "self", "negative_slope")
    mask = insert_call(node.graph, aten.gt.Scalar, (x, 0), before=node)
    small = insert_call(node.graph, aten.mul.Scalar, (grad, slope), before=node)
    replace_node(node, insert_call(node.graph, aten.where.self, (mask, grad, small), before=node))
    return {mask}


def _write_prelu(node: Node) -> set[Node]:
    grad, x, weight = get_arguments(node, "grad_output", "self", "weight")
    graph = node.graph
    mask = insert_call(graph, aten.gt.Scalar, (x, 0), before=node)
    small = insert_call(graph, aten.mul.Tensor, (weight, grad), before=node)
    product = insert_call(graph, aten.mul.Tensor, (x, grad), before=node)
    made = (
        insert_call(graph, aten.where.self, (mask, grad, small), before=node),
        insert_call(graph, aten.masked_fill.Scalar, (product, mask, 0), before=node),
    )
    for part in list(node.users):
        replace_node(part, made[0 if part.args[1] == 0 else 1])
    return {mask}


def _fill(node: Node, grad: Any, comparisons: list[tuple[Any, tuple[Any, ...]]]) -> set[Node]:
    """Write a gradient that is 0 where one of the comparisons holds."""
    masks = [insert_call(node.graph, target, args, before=node) for target, args in comparisons]
    mask = masks[0]
    if len(masks) > 1:
        mask = insert_call(node.graph, aten.logical_or.default, tuple(masks), before=node)
    replace_node(node, insert_call(node.graph, aten.masked_fill.Scalar, (grad, mask, 0), before=node))
    return {*masks, mask}


#: gradient of two pieces → what writes it out, and returns the nodes that compute the mask
_WRITERS: Final[Mapping[Any, Callable[[Node], set[Node]]]] = {
    aten.threshold_backward.default: _write_threshold,
    aten.leaky_relu_backward.default: _write_leaky,
    aten._prelu_kernel_backward.default: _write_prelu,
    aten.hardtanh_backward.default: _write_hardtanh,
    aten.hardshrink_backward.default: _write_shrink,
    aten.softshrink_backward.default: _write_shrink,
}
