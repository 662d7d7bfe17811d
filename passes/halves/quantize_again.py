"""Parameters, buffers and data are alive in backward anyway: their codes are made again there, and not saved."""

import dataclasses
from typing import ClassVar, cast

from torch.fx import Graph, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.arguments import get_argument, has_argument
from qcompiler.passes.ir.edit import find_equal_call, list_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import copy_meta, get_input, set_half
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.runtime import ops

#: operators that backward runs again; a scale with a state is saved, since the state moves on
_AGAIN = (ops.SCALE, ops.ZERO_POINT, ops.QUANTIZE, ops.PACK, ops.CHECKED)


@dataclasses.dataclass(frozen=True)
class QuantizeAgain:
    """forward saves quantize(W) → forward saves W, which costs no bytes; backward reads quantize(W).

    1. The codes are the same bit for bit: the rounding is to nearest, or its random key is the saved one.
    2. The scale is computed again too, but for a range that keeps a state: that scale is saved.
    3. In autocast W is cast first; backward casts again: quantize(cast(W)).
    4. As in plain PyTorch, a weight that is changed in place between forward and backward is an error of autograd.
    """

    name: ClassVar[str] = "quantize-again"

    def __call__(self, halves: Halves) -> int:
        """Return the number of tensors that are no longer saved."""
        if halves.forward is None or halves.backward is None:
            return 0
        table = SavedTable(halves)
        alive = _list_alive(halves.forward.graph, halves.backward.graph)
        found = [node for node in table.inputs if isinstance(node, Node) and _is_made_of(alive, node)]
        again = _Copies(table, found)
        for node in found:
            again.replace(node)
        table.drop_unread()
        table.write()
        return len(found)


def _list_alive(forward: Graph, backward: Graph) -> set[Node]:
    """Return the inputs of forward that live on: parameters, buffers, and data, which have no gradient."""
    inputs, gradients = forward.find_nodes(op="placeholder"), list_outputs(backward)
    facts = [(node, get_input(node), gradient) for node, gradient in zip(inputs, gradients, strict=False)]
    data = {node for node, fact, gradient in facts if fact and fact.kind is InputKind.INPUT and gradient is None}
    return data | {node for node, fact, _ in facts if fact and fact.kind in (InputKind.PARAMETER, InputKind.BUFFER)}


def _is_made_of(alive: set[Node], node: Node) -> bool:
    """Return True for codes of a tensor that is alive, and for their scale if the scale needs no state."""
    if node.target not in _AGAIN or not _is_copied(node):
        return False
    while _is_copied(node):
        node = _get_tensor(node)
    return node in alive


def _is_copied(node: Node) -> bool:
    """Return True for a part of a quantizer that backward runs again, for a view, and for a cast of autocast."""
    return _is_read_through(node) or (node.target in _AGAIN and not _keeps_state(node))


def _is_read_through(node: Node) -> bool:
    return is_view(node) or node.target is aten._to_copy.default


def _get_tensor(node: Node) -> Node:
    """Return the tensor that a view, a cast or a part of a quantizer reads; of packed codes the codes."""
    if _is_read_through(node):
        return cast(Node, node.args[0])
    return cast(Node, get_argument(node, "codes" if node.target is ops.PACK else "x"))


def _keeps_state(node: Node) -> bool:
    return node.target in (ops.SCALE, ops.ZERO_POINT) and has_argument(node, "state")


class _Copies:
    """Nodes of forward, copied into backward, each in front of everything that needs it."""

    def __init__(self, table: SavedTable, found: list[Node]) -> None:
        self.table = table
        self.made: dict[Node, Node] = {}
        #: node to copy → the first reader in backward of anything that is made of it
        self.places: dict[Node, Node] = {}
        for node in found:
            self._find_place(node, min(table.inputs[node].users))

    def _find_place(self, node: Node, reader: Node) -> None:
        self.places[node] = min(reader, self.places.get(node, reader))
        for source in node.all_input_nodes:
            self._find_place(source, reader)

    def replace(self, node: Node) -> None:
        """Make a saved node anew in backward."""
        self.table.replace(node, self._copy(node))

    def _copy(self, node: Node) -> Node:
        """Return a node of forward in backward: copied, or saved if it is no part of a quantizer."""
        if not _is_copied(node):
            return self._find_computed(node) or self.table.take(node)
        if node not in self.made:
            sources = {source: self._copy(source) for source in node.all_input_nodes}
            self.made[node] = self._find_equal(node, sources) or self._write_copy(node, sources)
        return self.made[node]

    def _find_computed(self, node: Node) -> Node | None:
        """Return a node of forward that backward holds already: saved, or computed again by the partitioner."""
        if node in self.table.inputs:
            return self.table.inputs[node]
        found = {source: self._find_computed(source) for source in node.all_input_nodes}
        sources = {source: twin for source, twin in found.items() if twin is not None}
        return self._find_equal(node, sources) if 0 < len(sources) == len(found) else None

    def _find_equal(self, node: Node, sources: dict[Node, Node]) -> Node | None:
        """Return the same call where the partitioner has put it into backward, in front of all that will read it."""
        equal, place = find_equal_call(node, sources), self.places[node]
        if equal is not None and place < equal:
            place.prepend(equal)
        return equal

    def _write_copy(self, node: Node, sources: dict[Node, Node]) -> Node:
        with self.table.backward.inserting_before(self.places[node]):
            made = self.table.backward.node_copy(node, sources.__getitem__)
        copy_meta(node, made)
        set_half(made, backward=True)
        return made
