"""The check after each pass of a pipeline, of graphs that a pass has changed."""

import itertools
import operator
from typing import Any, Final

from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.edit import clean_graph
from qcompiler.passes.ir.meta import has_value, list_facts
from qcompiler.passes.ir.verify import find_affected, verify_graph

#: entries of a node in a state: the node, its name, target, arguments and keywords, and three facts
_PARTS: Final = 8
#: a search for the nodes whose rules can have broken takes longer than the rules of a third of the graph
_SHARE: Final = 3


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
    """Return everything that rules read, node by node: the calls in order, and the facts of passes/ir/meta.py.

    Arguments, facts and values of nodes are replaced, never changed, so that the same objects mean the same state.
    """
    state: list[Any] = []
    for node in graph.nodes:  # once, as a large graph does not fit into the cache
        state += (node, node.name, node.target, node.args, node.kwargs, *list_facts(node))
    return state


def list_changed(state: list[Any], before: list[Any]) -> list[Node]:
    """Return the nodes of a graph that are new, or of which something changed that rules read."""
    places = dict(zip(before[::_PARTS], itertools.count(0, _PARTS)))
    changed = []
    for place, node in zip(itertools.count(0, _PARTS), state[::_PARTS]):
        old = places.get(node)
        if old is None or not _are_same(state[place : place + _PARTS], before[old : old + _PARTS]):
            changed.append(node)
    return changed


def _list_affected(state: list[Any], before: list[Any]) -> set[Node] | None:
    """Return the nodes whose rules can have broken; None: all, at the first check, of large changes, without values."""
    changed = list_changed(state, before) if before else []
    is_known = all(has_value(node) for node in changed if node.op == "call_function")
    is_small = 0 < len(changed) * _PARTS * _SHARE < len(state)
    return find_affected(changed) if is_small and is_known else None


def _are_same(state: list[Any], before: list[Any]) -> bool:
    return len(state) == len(before) and all(map(operator.is_, state, before))
