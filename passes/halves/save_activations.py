"""Save floats for operators without a contraction as codes: inputs of norms, GELU, softmax, q, k and v of attention."""

import dataclasses
from typing import ClassVar

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import Quantizer, write_quantizer
from qcompiler.passes.ir.saved_floats import SavedFloat, find_codes, iterate_saved
from qcompiler.passes.ir.views import aten
from qcompiler.passes.rules import Rule, saves_floats


@dataclasses.dataclass(frozen=True)
class SaveActivations:
    """forward saves X → forward saves quantize(X), by the first rule of the role *saved*; backward reads dequantize.

    1. If a contraction has codes of X with as many bits, or more, those codes are saved: one set of codes.
    2. Else X gets a quantizer of its own. Nobody in forward reads it: outputs stay bit for bit as they were.
    3. Statistics (mean, deviation, log-sum-exp), logarithms of probabilities, operands that a rule keeps in float,
       floats from which the user's checkpoint computes again, and single numbers stay in float.
    4. A float stays too where backward divides by it, takes its root, logarithm or exponential, or compares it:
       rounding to 0 in place of 0.01 would make infinity of 100.
    """

    name: ClassVar[str] = "save-activations"
    rules: tuple[Rule, ...] = ()

    def __call__(self, halves: Halves) -> int:
        """Return the number of floats that are saved as codes."""
        if halves.forward is None or halves.backward is None or not saves_floats(self.rules):
            return 0
        table = SavedTable(halves)
        found = [one for one in iterate_saved(table.inputs, self.rules) if one.spec is not None]
        changes = sum(_save_float(table, one) for one in found)
        table.drop_unread()
        table.write()
        return changes


def _save_float(table: SavedTable, saved: SavedFloat) -> int:
    assert saved.spec is not None
    given = table.inputs[saved.node]
    if not given.users:
        return 1
    place = min(given.users)
    known = find_codes(saved.node, saved.spec)
    if known is not None:
        made = table.dequantize(known, place, _get_shown(known))
        shape = list(get_value(saved.node).shape)
        if list(get_value(made).shape) != shape:
            made = insert_call(table.backward, aten.reshape.default, (made, shape), before=place)
    else:
        made = table.dequantize(write_quantizer(saved.node, saved.spec, saved.layout, saved.site), place)
    table.replace(saved.node, made)
    return 1


def _get_shown(quantizer: Quantizer) -> Node | None:
    """Return the tensor whose NaN the scale does not show; None if the scale shows them."""
    return quantizer.tensor if quantizer.spec.range.is_static else None
