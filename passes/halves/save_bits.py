"""Save masks as one bit an element."""

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import find_value, get_value
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class SaveBits:
    """forward saves a mask, one byte an element → forward saves pack(mask), one bit; backward reads unpack of it.

    Masks are those of dropout and of comparisons that the model writes.
    """

    name: ClassVar[str] = "save-bits"

    def __call__(self, halves: Halves) -> int:
        """Return the number of masks that are saved as bits."""
        if halves.forward is None or halves.backward is None:
            return 0
        table = SavedTable(halves)
        found = [node for node in table.inputs if isinstance(node, Node) and _is_mask(node)]
        for node in found:
            _save_mask(table, node)
        table.write()
        return len(found)


def _is_mask(node: Node) -> bool:
    value = find_value(node)
    return node.op != "placeholder" and isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _save_mask(table: SavedTable, node: Node) -> None:
    packed = insert_call(table.forward, ops.PACK, (node, 1), after=node)
    place = min(table.inputs[node].users)
    shape = list(get_value(node).shape)
    given = {"packed": table.take(packed), "shape": shape, "bits": 1, "signed": False}
    table.replace(node, insert_operator(table.backward, ops.UNPACK, given, before=place))
