"""Multiply codes as integers, where a kernel can."""

import dataclasses
import enum
from typing import ClassVar, cast

from torch.fx import GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.code_matrix import CodeMatrix, read_matrix
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value, iterate_contractions, set_fact
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import list_operands
from qcompiler.passes.joint.annotate_roles import MATRIX_PRODUCTS
from qcompiler.runtime import ops
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.kernels.table import find_kernel
from qcompiler.runtime.products import explain_product


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
    """mm(view(dequantize(A)), view(dequantize(B))) → matmul_codes(view(A), view(B)), in both halves.

    1. Both operands are codes of integers, no scale changes along the summed axis, and the table has a kernel.
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
        return sum(self._lower_half(half) for half in halves.graphs)

    def _lower_half(self, half: GraphModule) -> int:
        found = [(node, fact) for node, fact in iterate_contractions(half.graph) if node.target is not ops.MATMUL_CODES]
        quantized = [(node, fact) for node, fact in found if len(list_operands(node, fact)) == 2]
        return sum(self._lower_contraction(node, fact) for node, fact in quantized)

    def _lower_contraction(self, node: Node, fact: Contraction) -> bool:
        product = _read_product(node, faster=self.execution is Execution.AUTO)
        if isinstance(product, str):
            set_fact(node, dataclasses.replace(fact, simulated=product))
            return False
        _write_product(node, fact, *product)
        return True


def _read_product(node: Node, *, faster: bool) -> tuple[CodeMatrix, CodeMatrix, str] | str:
    """Return both operands of a contraction and the name of the kernel, or the reason why there is none."""
    if node.target not in (aten.mm.default, aten.addmm.default):
        return f"no kernel computes {node.target} on codes"
    if node.target is aten.addmm.default and (get_argument(node, "beta"), get_argument(node, "alpha")) != (1, 1):
        return "the product is scaled by a number of its own"
    first, second = MATRIX_PRODUCTS[node.target]
    left, right = read_matrix(cast(Node, node.args[first]), 0), read_matrix(cast(Node, node.args[second]), 1)
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    facts = _list_facts(node, left, right)
    reason = explain_product(facts, get_value(node).dtype)
    kernel = reason or find_kernel(facts, faster=faster)
    return kernel if isinstance(kernel, str) else (left, right, kernel.name)


def _list_facts(node: Node, left: CodeMatrix, right: CodeMatrix) -> Facts:
    """Return what kernels go by."""
    formats = left.reader.spec.format, right.reader.spec.format
    length = get_value(left.reader.codes).numel() // max(1, left.extent)
    device = get_value(node).device.type
    return Facts(device=device, formats=formats, rows=left.extent, length=length, columns=right.extent)


def _write_product(node: Node, fact: Contraction, left: CodeMatrix, right: CodeMatrix, kernel: str) -> None:
    """Write the product of codes in place of a contraction."""
    given = {
        "a": left.insert_codes(node),
        "a_scale": left.insert_scale(node),
        "a_zero_point": left.reader.zero_point,
        "b": right.insert_codes(node),
        "b_scale": right.insert_scale(node),
        "b_zero_point": right.reader.zero_point,
        "bias": node.args[0] if node.target is aten.addmm.default else None,
        "a_spec": left.reader.text,
        "b_spec": right.reader.text,
        "a_edge": left.edge,
        "b_edge": right.edge,
        "kernel": kernel,
        "dtype": get_value(node).dtype,
    }
    made = insert_operator(node.graph, ops.MATMUL_CODES, given, before=node, name=f"{node.name}_codes")
    # the left operand is the first argument of both operators, the right one the fourth
    first = min(operand.arg for operand in fact.operands)
    operands = tuple(dataclasses.replace(o, arg=0 if o.arg == first else 3) for o in fact.operands)
    set_fact(made, dataclasses.replace(fact, operands=operands))
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
