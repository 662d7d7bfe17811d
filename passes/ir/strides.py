"""The strides that every traced node reads: kernels choose an algorithm and the memory format of a result by strides.

Some kernels expect one memory format in several operands and return wrong numbers for any other: the gradient of a
group norm walks through the input and the gradient of the output side by side.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import list_arguments
from qcompiler.passes.ir.meta import get_contraction, get_value, has_value, set_strides_read, strides_read

#: the stride of each dimension of more than one element
Strides: TypeAlias = tuple[int, ...]


def record_strides(graph: Graph) -> None:
    """Write down, on each node of a captured graph, the strides of every tensor that the node reads."""
    for node in graph.nodes:
        if node.op in ("call_function", "output"):
            set_strides_read(node, tuple(map(get_strides, list_arguments(node))))


def get_strides(argument: Any) -> Strides | None:
    """Return the strides of the fake value of a node; None for anything but a strided tensor with elements."""
    val = get_value(argument) if isinstance(argument, Node) and has_value(argument) else None
    if not isinstance(val, torch.Tensor) or val.layout is not torch.strided or _has_free_extent(val) or not val.numel():
        return None
    return tuple(stride for stride, extent in zip(val.stride(), val.shape, strict=True) if extent != 1)


def may_read_any(node: Node) -> bool:
    """Return True for a contraction, and for a call that a pass wrote: neither depends on the traced strides.

    A contraction gives the same numbers for any strides of the operands, in a memory format that depends on the
    strides.
    """
    fact = get_contraction(node)
    return strides_read(node) is None or (fact is not None and bool(fact.operands))


def changed_reads(node: Node) -> Iterator[tuple[int, Node]]:
    """Yield the place in `list_arguments`, and the node, of each tensor that is read with other strides than traced."""
    traced = strides_read(node) or ()
    for place, (argument, before) in enumerate(zip(list_arguments(node), traced, strict=False)):
        strides = get_strides(argument)
        if None not in (strides, before) and strides != before:
            yield place, argument


def _has_free_extent(tensor: torch.Tensor) -> bool:
    return any(not isinstance(number, int) for number in (*tensor.shape, *tensor.stride()))
