"""Give every traced operator the traced strides back."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import ClassVar, TypeAlias

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.arguments import replace_arguments
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.inference import infer_value, is_outdated
from qcompiler.passes.ir.meta import get_value, is_backward, pin_to_backward, set_value, strides_read
from qcompiler.passes.ir.strides import Strides, changed_reads, may_read_any
from qcompiler.runtime import ops

#: (tensor, strides, half) → the copy of the tensor with these strides
_Copies: TypeAlias = dict[tuple[Node, Strides, bool], Node]


@dataclasses.dataclass(frozen=True)
class RestoreStrides:
    """norm(X) → norm(lay_out(X, strides)), if a pass has changed the strides of X since the graph was captured.

    1. Contractions, and calls that passes wrote, read any strides. The results are inferred again.
    2. All other operators, and the outputs of the graph, read the strides that were traced: kernels choose memory
       formats by strides, and users call `view` on outputs.
    3. The copy stands in front of the first reader, in the half of that reader; readers of one half share the copy.
    4. A tensor whose elements overlapped in memory (`expand`) when traced stays: no copy can have such strides.
    """

    name: ClassVar[str] = "restore-strides"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of copies that were placed."""
        nodes = [node for node in module.graph.nodes if node.op in ("call_function", "output")]
        copies: _Copies = {}
        if any(strides_read(node) is not None for node in nodes):
            for node in nodes:
                _restore_reads(node, copies)
        return len(copies)


def _restore_reads(node: Node, copies: _Copies) -> None:
    changed = list(changed_reads(node))
    if node.target is operator.getitem:
        set_value(node, get_value(node.all_input_nodes[0])[node.args[1]])  # type: ignore[index]
    elif node.op == "call_function" and may_read_any(node):
        if changed or (strides_read(node) is None and is_outdated(node)):
            infer_value(node)
    elif changed:
        _read_copies(node, changed, copies)


def _read_copies(node: Node, changed: Iterable[tuple[int, Node]], copies: _Copies) -> None:
    """Case 3 for one reader."""
    traced = strides_read(node)
    assert traced is not None
    copied: dict[int, Node] = {}
    for place, source in changed:
        strides = traced[place]
        if strides is not None and 0 not in strides:
            key = (source, strides, is_backward(node))
            copies[key] = copied[place] = copies.get(key) or _lay_out(source, strides, node)
    replace_arguments(node, copied)


def _lay_out(source: Node, strides: Strides, reader: Node) -> Node:
    given = iter(strides)
    whole = [1 if extent == 1 else next(given) for extent in get_value(source).shape]
    copy = insert_call(source.graph, ops.LAY_OUT, (source, whole), before=reader)
    if is_backward(reader):
        pin_to_backward(copy)
    return copy
