"""The check after each pass of a pipeline, of graphs that a pass has changed."""

import operator
from typing import Any, Final

from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.edit import clean_graph
from qcompiler.passes.ir.meta import has_value, list_facts
from qcompiler.passes.ir.verify import find_affected, verify_graph

#: lists that a state has: nodes, names, targets, arguments, keywords, and three facts
_PARTS: Final = 8


class GraphChecker:
    """Drop unread nodes, and check every rule on the rest, unless nothing has changed since the last check.

    Half of the passes change nothing in a given graph, and others change one half alone. The checker does not ask the
    pass: it compares everything that rules read, and checks the rules around nodes that changed. A pipeline
    has a checker of its own.
    """

    def __init__(self) -> None:
        self._accepted: dict[GraphModule, list[Any]] = {}

    def __call__(self, module: GraphModule) -> None:
        """Check one graph.

        Raises:
            VerifyError: with the first node that breaks a rule.
        """
        state, before = list_state(module.graph), self._accepted.pop(module, [])
        if not _are_same(state, before):
            nodes = len(module.graph.nodes)
            clean_graph(module)
            verify_graph(module, _list_affected(state, before))
            if len(module.graph.nodes) != nodes:
                state = list_state(module.graph)
        self._accepted[module] = state


def list_state(graph: Graph) -> list[Any]:
    """Return everything that rules read: the nodes in order, their calls, and the facts of passes/ir/meta.py.

    Arguments, facts and values of nodes are replaced, never changed, so that the same objects mean the same state.
    """
    nodes = list(graph.nodes)
    calls = [node.target for node in nodes] + [node.args for node in nodes] + [node.kwargs for node in nodes]
    return nodes + [node.name for node in nodes] + calls + list_facts(nodes)


def list_changed(state: list[Any], before: list[Any]) -> list[Node]:
    """Return the nodes of a graph that are new, or of which something changed that rules read."""
    count, earlier = len(state) // _PARTS, len(before) // _PARTS
    parts = [(state[i * count : (i + 1) * count], before[i * earlier : (i + 1) * earlier]) for i in range(1, _PARTS)]
    places = {node: place for place, node in enumerate(before[:earlier])}
    changed = []
    for place, node in enumerate(state[:count]):
        old = places.get(node)
        if old is None or any(now[place] is not then[old] for now, then in parts):
            changed.append(node)
    return changed


def _list_affected(state: list[Any], before: list[Any]) -> set[Node] | None:
    """Return the nodes whose rules can have broken; None: all, at the first check, or if calls have no value."""
    changed = list_changed(state, before) if before else []
    is_known = all(has_value(node) for node in changed if node.op == "call_function")
    return find_affected(changed) if changed and is_known else None


def _are_same(state: list[Any], before: list[Any]) -> bool:
    return len(state) == len(before) and all(map(operator.is_, state, before))
