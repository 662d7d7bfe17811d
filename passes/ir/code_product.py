"""A contraction as one product of two matrices of codes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Target

from qcompiler.passes.ir.code_matrix import CodeMatrix
from qcompiler.passes.ir.facts import Contraction, Operand
from qcompiler.passes.ir.meta import get_value, iterate_contractions, set_fact
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import list_operands
from qcompiler.runtime import ops
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.kernels.table import find_kernel
from qcompiler.runtime.products import explain_product

#: letter of the summed axis → letter of the other axis of that matrix
_FREE: Final = {"c": "b", "b": "c", "i": "o", "o": "i"}

#: contractions of more than two axes, which are products of patches
CONVOLUTIONS: Final = (aten.convolution.default, aten.convolution_backward.default)


@dataclasses.dataclass(frozen=True)
class Side:
    """One matrix: the tensor whose codes it holds, and how many rows or columns there are and share a scale."""

    tensor: CodeMatrix
    extent: int
    edge: int
    #: elements of a sum that share a scale; 0: all of them
    run: int = 0


def _list_products_of_codes(graph: Graph) -> list[tuple[Node, Contraction]]:
    """Return every contraction whose operands are both codes that became floats."""
    found = [(node, fact) for node, fact in iterate_contractions(graph) if node.target not in ops.PRODUCTS_OF_CODES]
    return [(node, fact) for node, fact in found if len(list_operands(node, fact)) == 2]


def lower_products(
    graphs: Iterable[GraphModule], lower: Callable[[Node, Contraction], str], *, convolutions: bool
) -> int:
    """Lower products of codes; return the number of those that were lowered, and note the reason at the others.

    Args:
        lower: writes a product in place of a contraction, or returns the reason why that cannot be done.
        convolutions: which contractions: convolutions, or all others.
    """
    lowered = 0
    for half in graphs:
        for node, fact in _list_products_of_codes(half.graph):
            if (node.target in CONVOLUTIONS) != convolutions:
                continue
            reason = lower(node, fact)
            if reason:
                set_fact(node, dataclasses.replace(fact, simulated=reason))
            lowered += not reason
    return lowered


def choose_kernel(
    left: Side,
    right: Side,
    length: int,
    dtype: torch.dtype,
    *,
    faster: bool,
    reuse: int = 0,
    image: str = "",
    inner: int = 1,
    is_batch: bool = False,
) -> tuple[str, str]:
    """Return the name of a kernel and an empty string, or an empty name and the reason why there is none.

    Args:
        length: products in a sum.
        dtype: of the result.
        faster: only a kernel that is faster than the float kernel.
        reuse: products that read one element of copied patches; 0: nothing is copied.
        image: the side that is an image, read through windows: left, right, or empty for a product of matrices.
        inner: elements of a sum for each index that runs count.
        is_batch: whether several pairs of matrices are multiplied.
    """
    formats = left.tensor.reader.spec.format, right.tensor.reader.spec.format
    device = get_value(left.tensor.reader.codes).device.type
    extents = {"rows": left.extent, "length": length, "columns": right.extent}
    run = math.gcd(left.run, right.run) * inner
    facts = Facts(device=device, formats=formats, **extents, reuse=reuse, image=image, run=run, is_batch=is_batch)
    found = explain_product(facts, dtype) or find_kernel(facts, faster=faster)
    return ("", found) if isinstance(found, str) else (found.name, "")


def insert_product(
    node: Node,
    fact: Contraction,
    left: tuple[Side, Node],
    right: tuple[Side, Node],
    bias: Node | None,
    kernel: str,
    dtype: torch.dtype,
    target: Target = ops.MATMUL_CODES,
    geometry: Mapping[str, Any] | None = None,
) -> Node:
    """Return the product of two matrices of codes in front of a contraction, with the facts of the contraction.

    Args:
        target: the operator; any but `matmul_codes` reads the tensors as the contraction does.
        geometry: the arguments that the operator has besides those of `matmul_codes`.
    """
    (a, a_codes), (b, b_codes) = left, right
    given = {
        "a": a_codes,
        "a_scale": a.tensor.insert_scale(node),
        "a_zero_point": a.tensor.reader.zero_point,
        "b": b_codes,
        "b_scale": b.tensor.insert_scale(node),
        "b_zero_point": b.tensor.reader.zero_point,
        "bias": bias,
        "a_spec": a.tensor.reader.text,
        "b_spec": b.tensor.reader.text,
        "a_edge": a.edge,
        "b_edge": b.edge,
        "kernel": kernel,
        "dtype": dtype,
        **({"a_run": a.run, "b_run": b.run} if a.run or b.run else {}),
        **(geometry or {}),
    }
    made = insert_operator(node.graph, target, given, before=node, name=f"{node.name}_codes")
    first = min(operand.arg for operand in fact.operands)
    operands = (_describe_operand(one, made, is_left=one.arg == first) for one in fact.operands)
    set_fact(made, dataclasses.replace(fact, operands=tuple(operands)))
    return made


def _describe_operand(operand: Operand, product: Node, *, is_left: bool) -> Operand:
    """Return an operand as the product reads it: as the first argument if left, or else as the fourth."""
    arg = 0 if is_left else 3
    if product.target is not ops.MATMUL_CODES:
        return dataclasses.replace(operand, arg=arg)
    summed, free = operand.contracted, _FREE[operand.contracted]
    batch = "g" * (get_value(cast(Node, product.args[arg])).ndim - 2)
    return dataclasses.replace(operand, arg=arg, layout=batch + (free + summed if is_left else summed + free))
