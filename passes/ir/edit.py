"""Changes of a graph: new calls, inputs and outputs, each with the value inferred."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

from qcompiler.passes.ir.facts import Input, InputKind
from qcompiler.passes.ir.inference import fake_mode, infer_value
from qcompiler.passes.ir.meta import (
    copy_meta,
    copy_origin,
    is_backward,
    set_fact,
    set_half,
    set_value,
)


def copy_nodes(graph: Graph) -> Graph:
    """Return the same nodes, names and facts in another graph."""
    copied = Graph()
    outputs = copied.graph_copy(graph, {})
    copy_meta(graph.output_node(), copied.output(outputs))
    return copied


def copy_graph(module: GraphModule) -> GraphModule:
    """Return a module with a copy of the graph, over the same attributes; its code is written when somebody asks."""
    return make_module(module, copy_nodes(module.graph))


def make_module(attributes: dict[str, Any] | GraphModule, graph: Graph) -> GraphModule:
    """Return a module with a graph, over what its nodes read by name; its code is written when somebody asks."""
    return _LazyGraphModule(attributes, graph)


def last_placeholder(graph: Graph) -> Node:
    """Return the last of the inputs, which stand at the head of the graph."""
    node: Node = graph.find_nodes(op="placeholder", sort=False)[-1]  # the newest: sorting them takes long
    while node.next.op == "placeholder":
        node = node.next
    return node


def insert_input(graph: Graph, name: str) -> Node:
    """Return a new input at the graph's point of insertion; its argument is called as the node is, in code too.

    Torch calls the argument `name`, and the node `name_1` if another node is `name`: code that reads the argument late
    would read that other node.
    """
    node: Node = graph.placeholder(name)
    node.target = node.name
    return node


def add_input(graph: Graph, like: torch.Tensor, kind: InputKind, name: str, *, backward: bool) -> Node:
    """Return a new input of the graph, behind all others, of the half that reads the input.

    The partitioner knows the inputs of backward by "tangents" in the names.
    """
    count = len(graph.find_nodes(op="placeholder"))
    with graph.inserting_after(last_placeholder(graph)):
        node = insert_input(graph, f"tangents_{kind}_{count}" if backward else f"{kind}_{count}")
    set_half(node, backward=backward)
    with fake_mode(graph):
        set_value(node, torch.empty_like(like))
    set_fact(node, Input(kind, name))
    return node


def find_equal_call(node: Node, sources: Mapping[Node, Node]) -> Node | None:
    """Return the call that does the same as a node of another graph; `sources`: what a node reads → its twin here."""
    args = map_arg(node.args, sources.__getitem__)
    call = (node.target, args, node.kwargs)
    readers = sources[node.all_input_nodes[0]].users
    return next((user for user in readers if (user.target, user.args, user.kwargs) == call), None)


def list_outputs(graph: Graph) -> list[Any]:
    """Return the outputs of a graph: nodes, numbers and None."""
    (outputs,) = graph.output_node().args
    return list(cast(tuple[Any, ...], outputs))


def set_outputs(graph: Graph, outputs: Sequence[Any]) -> None:
    """Make a graph return other outputs."""
    graph.output_node().args = (tuple(outputs),)


def add_output(graph: Graph, node: Node | None) -> None:
    """Add an output behind all others."""
    set_outputs(graph, [*list_outputs(graph), node])


def remove_outputs(graph: Graph, nodes: Sequence[Node]) -> None:
    """Take nodes out of the outputs of a graph."""
    set_outputs(graph, [output for output in list_outputs(graph) if output not in nodes])


def insert_call(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    after: Node | None = None,
    before: Node | None = None,
    name: str = "",
) -> Node:
    """Return a new call with an inferred shape and the partitioner tag of the place; one of `after`, `before` is given.

    The tag comes from the neighbor, or is backward if any argument is. Two halves share no name but for nodes that
    backward computes again, so a pass over halves gives a `name`; empty: the name of the operator.
    """
    place = after if after is not None else before
    assert place is not None
    if after is not None and after.op == "placeholder":
        after = last_placeholder(graph)
    with graph.inserting_after(after) if after is not None else graph.inserting_before(before):
        name = name or str(getattr(target, "__name__", target)).partition(".")[0]
        node = graph.create_node("call_function", target, args, kwargs or {}, name=name)
    neighbors = [a for a in args if isinstance(a, Node)]
    backward = any(is_backward(a) for a in neighbors) or (before is not None and is_backward(before))
    set_half(node, backward=backward)
    copy_origin(place, node)
    infer_value(node)
    return node


def insert_result(call: Node, place: int) -> Node:
    """Return one result of a call that has several."""
    return insert_call(call.graph, operator.getitem, (call, place), after=call)


def replace_node(node: Node, other: Node) -> None:
    """Make all readers of a node read another one, and erase the node."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def clean_graph(module: GraphModule) -> None:
    """Drop unread nodes, and check the links; the code of the module stays old until `recompile`."""
    graph = module.graph
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)
    if _has_unread(graph) or graph.find_nodes(op="get_attr"):
        graph.eliminate_dead_code()  # torch decides on calls that draw random numbers, and cleans the subgraphs
    else:
        check_order(graph)


def check_order(graph: Graph) -> None:
    """Raise RuntimeError if a node reads one that stands behind it, or that is of another graph.

    `Graph.lint` checks that too, and what fx itself keeps right, in three times the time.
    """
    above: set[Node] = set()
    for node in graph.nodes:
        if not above.issuperset(node.all_input_nodes):
            graph.lint()  # names the nodes
        above.add(node)


def _has_unread(graph: Graph) -> bool:
    return any(not node.users and node.op not in ("placeholder", "output") for node in graph.nodes)


def finish_graph(module: GraphModule) -> None:
    """Clean the graph after a pass, and recompile the module."""
    clean_graph(module)
    module.recompile()
