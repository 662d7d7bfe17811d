"""Save the place of each maximum of a pool in one byte."""

import dataclasses
import operator
from typing import Any, ClassVar

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
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
        changes = [_save_offsets(table, node, windows) for node, windows in found if windows is not None]
        table.write()
        return len(changes)


def _find_windows(node: Node) -> dict[str, Any] | None:
    """Return the windows of a pool whose indices a node is; None for any other node."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool = node.all_input_nodes[0]
    if pool.target is not aten.max_pool2d_with_indices.default:
        return None
    x, kernel, stride, padding, dilation = _read_arguments(pool)
    if set(dilation) != {1} or kernel[0] * kernel[1] > 256:
        return None
    plane = list(get_value(x).shape[-2:])
    return {"plane": plane, "kernel": kernel, "stride": stride or kernel, "padding": padding}


def _read_arguments(pool: Node) -> tuple[Any, list[int], list[int], list[int], list[int]]:
    """Return input, kernel, stride, padding and dilation of a pool, two numbers each."""
    x, *rest = pool.args
    pairs = [list(pair) for pair in (*rest, *((), (0, 0), (1, 1))[len(rest) - 1 :])][:4]  # type: ignore[misc]
    pairs = [pair * 2 if len(pair) == 1 else pair for pair in pairs]
    return x, pairs[0], pairs[1], pairs[2], pairs[3]


def _save_offsets(table: SavedTable, node: Node, windows: dict[str, Any]) -> None:
    offsets = insert_operator(table.forward, ops.POOL_OFFSETS, {"indices": node, **windows}, after=node)
    place = min(table.inputs[node].users)
    given = {"offsets": table.take(offsets), **windows}
    table.replace(node, insert_operator(table.backward, ops.POOL_INDICES, given, before=place))
