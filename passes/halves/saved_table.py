"""The tensors that forward saves for backward, as a table that a pass can change."""

from typing import Any

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import pack_arguments
from qcompiler.passes.ir.edit import insert_call, insert_input, list_outputs, replace_node, set_outputs
from qcompiler.passes.ir.meta import copy_meta, get_value, set_half
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer, insert_operator
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.packing import per_byte


class SavedTable:
    """Node of forward → the input of backward that holds it, in order. It dies with the walk of its pass.

    Raises:
        ValueError: the halves have no backward.
    """

    def __init__(self, halves: Halves) -> None:
        if halves.forward is None or halves.backward is None:
            raise ValueError("saved table: the graph has no backward half")
        self.forward, self.backward = halves.forward.graph, halves.backward.graph
        self._outputs = halves.outputs
        saved = halves.saved
        given: list[Node] = list(self.backward.find_nodes(op="placeholder"))[: len(saved)]
        self.inputs: dict[Any, Node] = dict(zip(saved, given, strict=True))
        #: the first node behind the saved inputs
        self._first_other: Node = list(self.backward.nodes)[len(saved)]

    def take(self, node: Node) -> Node:
        """Return the input of backward that holds a node of forward, which is saved from now on."""
        if node not in self.inputs:
            with self.backward.inserting_before(self._first_other):
                made = insert_input(self.backward, node.name)
            copy_meta(node, made)
            self.inputs[node] = made
        return self.inputs[node]

    def replace(self, node: Node, made: Node) -> None:
        """Let backward read a node of its own in place of a saved one, which is no longer saved.

        A node that computes the same again gets the name of the saved one, as everything that runs in both halves.
        """
        given = self.inputs.pop(node)
        replace_node(given, made)
        if made.target is node.target:
            made.name = given.name

    def dequantize(self, coder: Quantizer | Dequantizer, place: Node, shown: Node | None = None) -> Node:
        """Return the floats of codes of forward, made in backward in front of `place`; the codes are saved.

        Codes of 4 bits and less are packed. A scale that does not show what is not finite in `shown` is checked first.
        """
        scale, point, behind = coder.scale, coder.zero_point, coder.node
        shared = {"spec": coder.text, "layout": coder.layout}
        if shown is not None:
            scale = self._call_behind(behind, ops.CHECKED, {"scale": scale, "x": shown, **shared}, scale)
        given = {
            "codes": self._take_codes(coder, place),
            "scale": self.take(scale),
            "zero_point": None if point is None else self.take(point),
            **shared,
            "dtype": coder.dtype,
        }
        return self._insert(ops.DEQUANTIZE, given, place)

    def _take_codes(self, coder: Quantizer | Dequantizer, place: Node) -> Node:
        """Return codes of forward in backward, as they are or unpacked."""
        codes, form = coder.codes, coder.spec.format
        if per_byte(form.bits) == 1:
            return self.take(codes)
        return self.take_packed(codes, form.bits, form.dtype.is_signed, place)

    def take_packed(self, codes: Node, bits: int, signed: bool, place: Node) -> Node:
        """Return codes or a mask of forward, saved several to a byte and unpacked in backward in front of `place`."""
        packed = self._call_behind(codes, ops.PACK, {"codes": codes, "bits": bits}, codes)
        shape = list(get_value(codes).shape)
        given = {"packed": self.take(packed), "shape": shape, "bits": bits, "signed": signed}
        return self._insert(ops.UNPACK, given, place)

    def _insert(self, target: Any, given: dict[str, Any], place: Node) -> Node:
        """Return a new call of backward, also in front of a node of forward that is computed again there."""
        made = insert_operator(self.backward, target, given, before=place)
        set_half(made, backward=True)
        return made

    def _call_behind(self, place: Node, target: Any, given: dict[str, Any], source: Node) -> Node:
        """Return the call of forward that `source` has already, or a new one."""
        args = pack_arguments(target, given)
        known = [user for user in source.users if user.target is target and user.args == args]
        return known[0] if known else insert_call(self.forward, target, args, after=place)

    def drop_unread(self) -> None:
        """Save no longer what backward does not read."""
        for node in [node for node, given in self.inputs.items() if not given.users]:
            self.backward.erase_node(self.inputs.pop(node))

    def write(self) -> None:
        """Make forward return exactly the nodes of the table behind its own outputs."""
        set_outputs(self.forward, [*list_outputs(self.forward)[: self._outputs], *self.inputs])
