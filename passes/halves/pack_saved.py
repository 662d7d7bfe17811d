"""Save masks and short codes several to a byte."""

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.meta import find_value
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.packing import per_byte


@dataclasses.dataclass(frozen=True)
class PackSaved:
    """forward saves codes or a mask, one byte an element → forward saves pack of it; backward reads unpack of that.

    1. A mask takes one bit an element: that of dropout, or of a comparison that the model writes.
    2. Codes of 4 bits and less are packed. The partitioner leaves them whole if backward reads their floats as well.
    """

    name: ClassVar[str] = "pack-saved"

    def __call__(self, halves: Halves) -> int:
        """Return the number of tensors that are packed."""
        if halves.forward is None or halves.backward is None:
            return 0
        table = SavedTable(halves)
        found = [(node, _find_form(node)) for node in table.inputs if isinstance(node, Node)]
        changes = [(node, form) for node, form in found if form is not None]
        for node, form in changes:
            table.replace(node, table.take_packed(node, *form, place=min(table.inputs[node].users)))
        table.write()
        return len(changes)


def _find_form(node: Node) -> tuple[int, bool] | None:
    """Return the bits of an element and its sign, if several fit into a byte; None for every other tensor."""
    value = find_value(node)
    if node.target is ops.QUANTIZE:
        form = Quantizer(node).spec.format
        return (form.bits, form.dtype.is_signed) if per_byte(form.bits) > 1 else None
    is_mask = node.op != "placeholder" and isinstance(value, torch.Tensor) and value.dtype is torch.bool
    return (1, False) if is_mask else None
