"""Read and move the ranges in hindsight of all sites at once, in place of arithmetic that a compiler makes for each."""

import collections
import dataclasses
import itertools
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument, get_arguments, has_argument
from qcompiler.passes.ir.edit import insert_call, insert_result, last_placeholder
from qcompiler.passes.ir.meta import find_value, get_value
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec
from qcompiler.runtime.stacked import find_hindsight

#: operators that read a state, in the order of the results of `read_ranges`: an update reads the reach
_READERS = (ops.SCALE, ops.UPDATE, ops.ZERO_POINT)


@dataclasses.dataclass(frozen=True)
class StackRanges:
    """scale(X, state), zero_point(X, state), update(X, state) of many X → read_ranges(states), move_ranges(states, …).

    1. In the copy of a half that a compiler gets, for each spec and device. A site keeps `measure(X)`: the reductions.
    2. The arithmetic on a few numbers a site is then two calls for all sites. A compiler makes a loop of its own for
       each: ResNet-20 with `in-hindsight-w8a8g8` took 2.4 times as long to compile as in float.
    3. First steps, which seek ranges in the tensors themselves, are never compiled, so never changed.
    """

    name: ClassVar[str] = "stack-ranges"

    def __call__(self, halves: Halves) -> int:
        """Return the number of calls that were replaced."""
        return sum(_stack_half(half) for half in halves.graphs)


def _stack_half(half: GraphModule) -> int:
    groups: dict[tuple[str, torch.device], list[Node]] = collections.defaultdict(list)
    for node in half.graph.nodes:
        if _reads_past(node):
            groups[get_argument(node, "spec"), get_value(get_argument(node, "state")).device].append(node)
    for (spec, _), nodes in groups.items():
        _stack_group(half.graph, spec, nodes)
    return sum(map(len, groups.values()))


def _reads_past(node: Node) -> bool:
    """Return True for a call whose range follows from a state that is known to hold one."""
    if node.target not in _READERS or not has_argument(node, "state") or get_argument(node, "first"):
        return False
    return find_hindsight(parse_spec(get_argument(node, "spec"))) is not None


def _stack_group(graph: Graph, spec: str, nodes: list[Node]) -> None:
    """Replace all calls of one spec."""
    states = list(dict.fromkeys(get_argument(node, "state") for node in nodes))
    given = {"states": states, "spec": spec, "dims": _list_dims(states, nodes)}
    call = insert_operator(graph, ops.READ_RANGES, given, after=last_placeholder(graph))
    results = [insert_result(call, place) for place in range(len(find_value(call)))]
    parts = dict(zip(itertools.product(_READERS, states), results, strict=False))  # not all formats have zero points
    part_of = {node: parts[node.target, get_argument(node, "state")] for node in nodes}
    updates = [node for node in nodes if node.target is ops.UPDATE]
    if updates:
        _move(updates, [_measure(node, part_of[node]) for node in updates])
    for node in nodes:
        if node.target is not ops.UPDATE:
            node.replace_all_uses_with(_shape_known(node, part_of[node]))
    for node in reversed(nodes):
        graph.erase_node(node)


def _list_dims(states: list[Node], nodes: list[Node]) -> list[int]:
    """Return the dimensions of the scale of each site with one block; 0 for others, and if readers differ."""
    found: dict[Node, set[tuple[int, ...]]] = {state: set() for state in states}
    for node in nodes:
        if node.target is not ops.UPDATE:
            found[get_argument(node, "state")].add(tuple(get_value(node).shape))
    shapes = [shapes.pop() if len(shapes) == 1 else () for shapes in found.values()]
    return [len(shape) * (set(shape) == {1}) for shape in shapes]


def _shape_known(node: Node, known: Node) -> Node:
    """Return a known scale or zero point in the shape of the node that it replaces."""
    shape = list(get_value(node).shape)
    if list(get_value(known).shape) == shape:
        return known
    return insert_call(node.graph, aten.view.default, (known, shape), before=node, name=f"{node.name}_known")


def _measure(update: Node, reach: Node) -> Node:
    """Return what the next state takes from one tensor."""
    x, spec, layout = get_arguments(update, "x", "spec", "layout")
    given = {"x": x, "reach": reach, "spec": spec, "layout": layout}
    return insert_operator(update.graph, ops.MEASURE, given, before=update)


def _move(updates: list[Node], measured: list[Node]) -> None:
    """Write the states after the step at the end of the graph, which returns them."""
    graph, spec = updates[0].graph, get_argument(updates[0], "spec")
    given = {"states": [get_argument(node, "state") for node in updates], "measured": measured, "spec": spec}
    call = insert_operator(graph, ops.MOVE_RANGES, given, before=graph.output_node())
    for place, node in enumerate(updates):
        node.replace_all_uses_with(insert_result(call, place))
