"""After the partition: what backward computes again from dequantized codes starts from the codes."""

import dataclasses
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import pack_arguments
from qcompiler.passes.ir.edit import insert_call, list_outputs, set_outputs
from qcompiler.passes.ir.meta import copy_meta, get_value
from qcompiler.passes.ir.quantizer import Dequantizer, insert_operator
from qcompiler.passes.ir.views import is_view
from qcompiler.passes.ir.walk import find_dequantizer
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.packing import per_byte


@dataclasses.dataclass(frozen=True)
class SaveCodes:
    """Where forward saves a float that codes were turned back into, it saves the codes, and backward turns them back.

    1. The partitioner saves such a float if backward computes an elementwise function of it again (the tanh form of
       GELU, for one): it knows our operators by their shapes alone, and takes none of them for cheap.
    2. Codes of 4 bits and less are packed.
    3. Of a range that does not show what is not finite, the scale is the checked one.
    """

    name: ClassVar[str] = "save-codes"

    def __call__(self, halves: Halves) -> int:
        """Return the number of floats that are saved as codes."""
        if halves.forward is None or halves.backward is None:
            return 0
        saved = halves.saved
        floats = [node for node in saved if isinstance(node, Node) and find_dequantizer(node) is not None]
        table = _SavedTable(halves.forward, halves.backward, saved)
        for node in floats:
            table.replace(node)
        set_outputs(halves.forward.graph, [*list_outputs(halves.forward.graph)[: halves.outputs], *table.saved])
        return len(floats)


class _SavedTable:
    """Both halves, and the table of what is saved, in order; it dies with the walk."""

    def __init__(self, forward: GraphModule, backward: GraphModule, saved: list[Any]) -> None:
        given: list[Node] = list(backward.graph.find_nodes(op="placeholder"))[: len(saved)]
        self.forward, self.backward = forward, backward
        #: node of forward → the input of backward that holds it
        self.saved: dict[Any, Node] = dict(zip(saved, given, strict=True))
        self.last = given[-1] if given else None

    def replace(self, floats: Node) -> None:
        """Saves the codes behind one float in its place."""
        placeholder = self.saved[floats]
        reader = min(placeholder.users)
        views = [floats]
        while is_view(views[-1]):
            views.append(views[-1].all_input_nodes[0])
        made = self._dequantize(views.pop(), reader)
        for view in reversed(views):
            args = (made, *view.args[1:])
            made = insert_call(self.backward.graph, view.target, args, dict(view.kwargs), before=reader)
        placeholder.replace_all_uses_with(made)
        del self.saved[floats]
        self.last = next(reversed(self.saved.values()), None)
        self.backward.graph.erase_node(placeholder)

    def _dequantize(self, root: Node, place: Node) -> Node:
        """Return the dequantize `root` of forward, anew in backward."""
        reader = Dequantizer(root)
        codes, scale, point = reader.codes, reader.scale, reader.zero_point
        shared = {"spec": reader.text, "layout": reader.layout}
        if reader.shown is not None:
            scale = self._call_beside(scale, ops.CHECKED, {"scale": scale, "x": reader.shown, **shared}, root)
        form = reader.spec.format
        if per_byte(form.bits) == 1:
            whole = self._take_saved(codes)
        else:
            packed = self._take_saved(self._call_beside(codes, ops.PACK, {"codes": codes, "bits": form.bits}, root))
            shape, signed = list(get_value(codes).shape), form.dtype.is_signed
            given = {"packed": packed, "shape": shape, "bits": form.bits, "signed": signed}
            whole = insert_operator(self.backward.graph, ops.UNPACK, given, before=place)
        zero = None if point is None else self._take_saved(point)
        given = {"codes": whole, "scale": self._take_saved(scale), "zero_point": zero, **shared, "dtype": reader.dtype}
        return insert_operator(self.backward.graph, ops.DEQUANTIZE, given, before=place)

    def _call_beside(self, source: Node, target: Any, given: dict[str, Any], before: Node) -> Node:
        """Return the call of forward that `source` has already, or a new one."""
        args = pack_arguments(target, given)
        known = [user for user in source.users if user.target is target and user.args == args]
        return known[0] if known else insert_call(self.forward.graph, target, args, before=before)

    def _take_saved(self, node: Node) -> Node:
        """Return the input of backward that holds what a node of forward saves."""
        if node not in self.saved:
            with self.backward.graph.inserting_after(self.last):
                made = self.backward.graph.placeholder(node.name)
            copy_meta(node, made)
            self.saved[node] = self.last = made
        return self.saved[node]
