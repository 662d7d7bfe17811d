"""Multiply codes as integers, where a kernel can."""

import dataclasses
import enum
from typing import ClassVar, cast

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.code_matrix import explain_runs, read_matrix
from qcompiler.passes.ir.code_product import Side, choose_kernel, insert_product, lower_products
from qcompiler.passes.ir.edit import replace_node
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.annotate_roles import MATRIX_PRODUCTS


class Execution(enum.StrEnum):
    """How contractions of codes are computed."""

    #: as floats, by the float kernel of the graph
    SIMULATE = "simulate"
    #: as integers, where that is faster
    AUTO = "auto"
    #: as integers, wherever a kernel can
    INTEGER = "integer"


@dataclasses.dataclass(frozen=True)
class LowerInteger:
    """mm(view(dequantize(A)), view(dequantize(B))) → matmul_codes(view(A), view(B)), in both halves; bmm as well.

    1. Both operands are codes of integers, and the table has a kernel. If scales change along the summed axis, they do
       so in runs; then the product is one of two matrices, and not of batches.
    2. What is not lowered has the reason in its `Contraction`.
    3. A dequantizer that others read stays for them.
    4. Of a range that does not show what is not finite, the scale is the checked one: NaN throughout the block, where
       the dequantizer has NaN at that element alone.
    """

    name: ClassVar[str] = "lower-integer"
    execution: Execution = Execution.SIMULATE

    def __call__(self, halves: Halves) -> int:
        """Return the number of contractions that were lowered."""
        if self.execution is Execution.SIMULATE or halves.is_whole:
            return 0
        return lower_products(halves.graphs, self._lower_contraction, convolutions=False)

    def _lower_contraction(self, node: Node, fact: Contraction) -> str:
        product = _read_product(node, faster=self.execution is Execution.AUTO)
        if isinstance(product, str):
            return product
        _write_product(node, fact, *product)
        return ""


def _read_product(node: Node, *, faster: bool) -> tuple[Side, Side, str] | str:
    """Return both operands of a contraction and the name of the kernel, or the reason why there is none."""
    if node.target not in MATRIX_PRODUCTS:
        return f"no kernel computes {node.target} on codes"
    first, second = MATRIX_PRODUCTS[node.target]
    if first == 1 and (get_argument(node, "beta"), get_argument(node, "alpha")) != (1, 1):
        return "the product is scaled by a number of its own"
    batch = tuple(range(get_value(node).ndim - 2))
    left = read_matrix(cast(Node, node.args[first]), *batch, len(batch))
    right = read_matrix(cast(Node, node.args[second]), *batch, len(batch) + 1)
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    *_, rows, columns = get_value(node).shape
    if batch and (left.run or right.run):
        return explain_runs(left) or explain_runs(right)
    sides = Side(left, rows, left.edge, left.run), Side(right, columns, right.edge, right.run)
    length = get_value(left.reader.codes).numel() // max(1, left.extent)
    kernel, reason = choose_kernel(*sides, length, get_value(node).dtype, faster=faster, is_batch=bool(batch))
    return reason or (*sides, kernel)


def _write_product(node: Node, fact: Contraction, left: Side, right: Side, kernel: str) -> None:
    """Write the product of codes in place of a contraction."""
    bias = cast(Node, node.args[0]) if node.target in (aten.addmm.default, aten.baddbmm.default) else None
    sides = (left, left.tensor.insert_codes(node)), (right, right.tensor.insert_codes(node))
    made = insert_product(node, fact, *sides, bias, kernel, get_value(node).dtype)
    replace_node(node, made)
