"""Save the place of each maximum of a pool in one byte."""

import dataclasses
import operator
from typing import Any, ClassVar

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class SavePoolWindows:
    """forward saves indices, int64 → forward saves pool_offsets(indices), uint8; backward reads pool_indices of them.

    An index counts in the whole plane, an offset in the window, which has 256 places at most here. Windows with
    dilation keep their indices.
    """

    name: ClassVar[str] = "save-pool-windows"

    def __call__(self, halves: Halves) -> int:
        """Return the number of tensors of indices that are saved as bytes."""
        if halves.forward is None or halves.backward is None:
            return 0
        table = SavedTable(halves)
        found = [(node, _find_windows(node)) for node in table.inputs if isinstance(node, Node)]
        changes = [(node, windows) for node, windows in found if windows is not None]
        for node, windows in changes:
            _save_offsets(table, node, windows)
        table.write()
        return len(changes)


def _find_windows(node: Node) -> dict[str, Any] | None:
    """Return the windows of a pool whose indices a node is; None for any other node."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool = node.all_input_nodes[0]
    if pool.target is not aten.max_pool2d_with_indices.default:
        return None
    kernel, stride, padding, dilation = (
        _read_pair(pool, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    if dilation != [1, 1] or kernel[0] * kernel[1] > 256:
        return None
    plane = list(get_value(get_argument(pool, "self")).shape[-2:])
    return {"plane": plane, "kernel": kernel, "stride": stride or kernel, "padding": padding}


def _read_pair(pool: Node, name: str) -> list[int]:
    """Return an argument for rows and columns; one number counts for both, none stays none."""
    given = get_argument(pool, name)
    pair = [given] if isinstance(given, int) else list(given)
    return pair * 2 if len(pair) == 1 else pair


def _save_offsets(table: SavedTable, node: Node, windows: dict[str, Any]) -> None:
    offsets = insert_operator(table.forward, ops.POOL_OFFSETS, {"indices": node, **windows}, after=node)
    place = min(table.inputs[node].users)
    given = {"offsets": table.take(offsets), **windows}
    table.replace(node, insert_operator(table.backward, ops.POOL_INDICES, given, before=place))
