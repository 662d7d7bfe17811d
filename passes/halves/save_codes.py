"""After the partition: what backward computes again from dequantized codes starts from the codes."""

import dataclasses
from typing import ClassVar

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.quantizer import Dequantizer
from qcompiler.passes.ir.views import is_view
from qcompiler.passes.ir.walk import find_dequantizer


@dataclasses.dataclass(frozen=True)
class SaveCodes:
    """Where forward saves a float that codes were turned back into, it saves the codes, and backward turns them back.

    1. The partitioner computes such a float again from codes, unless the float is pinned: by a checkpoint policy of the
       user, for one.
    2. Codes of 4 bits and less are packed.
    3. Of a range that does not show what is not finite, the scale is the checked one.
    """

    name: ClassVar[str] = "save-codes"

    def __call__(self, halves: Halves) -> int:
        """Return the number of floats that are saved as codes."""
        if halves.forward is None or halves.backward is None:
            return 0
        table = SavedTable(halves)
        floats = [node for node in table.inputs if isinstance(node, Node) and find_dequantizer(node) is not None]
        for node in floats:
            _replace_float(table, node)
        table.write()
        return len(floats)


def _replace_float(table: SavedTable, floats: Node) -> None:
    """Save the codes behind one float in its place."""
    place = min(table.inputs[floats].users)
    views = [floats]
    while is_view(views[-1]):
        views.append(views[-1].all_input_nodes[0])
    reader = Dequantizer(views.pop())
    made = table.dequantize(reader, place, reader.shown)
    for view in reversed(views):
        args = (made, *view.args[1:])
        made = insert_call(table.backward, view.target, args, dict(view.kwargs), before=place)
    table.replace(floats, made)
