"""Changes of a graph: new calls, inputs and outputs, each with the value inferred."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qcompiler.passes.ir.arguments import run_call
from qcompiler.passes.ir.facts import Input, InputKind
from qcompiler.passes.ir.meta import (
    copy_meta,
    copy_origin,
    find_value,
    get_inferred_from,
    get_value,
    is_backward,
    set_fact,
    set_half,
    set_inferred_from,
    set_value,
)


def copy_nodes(graph: Graph) -> Graph:
    """Return the same nodes, names and facts in another graph."""
    copied = Graph()
    outputs = copied.graph_copy(graph, {})
    copy_meta(graph.output_node(), copied.output(outputs))
    return copied


def copy_graph(module: GraphModule) -> GraphModule:
    """Return a module with a copy of the graph, over the same attributes."""
    return GraphModule(module, copy_nodes(module.graph))


def last_placeholder(graph: Graph) -> Node:
    """Return the last of the inputs, which stand at the head of the graph."""
    nodes: list[Node] = list(graph.find_nodes(op="placeholder"))
    return nodes[-1]


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


def infer_value(node: Node) -> None:
    """Computes the fake value of a call from the values of the arguments."""
    with fake_mode(node.graph), torch.no_grad():
        set_value(node, run_call(node, get_value))
    set_inferred_from(node, _list_values_read(node))


def is_outdated(node: Node) -> bool:
    """Return True if a node that a pass wrote was inferred from other fake values than the present ones."""
    before, now = get_inferred_from(node), _list_values_read(node)
    return len(before) != len(now) or any(old is not new for old, new in zip(before, now, strict=True))


def _list_values_read(node: Node) -> tuple[Any, ...]:
    return tuple(map(find_value, node.all_input_nodes))


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the mode that the graph's fake tensors belong to."""
    for node in graph.nodes:
        mode = getattr(find_value(node), "fake_mode", None)
        if mode is not None:
            return cast(FakeTensorMode, mode)
    raise ValueError(
        "graph: no node holds a fake tensor; capture it through torch.compile or make_fx(tracing_mode='fake')"
    )


def clean_graph(module: GraphModule) -> None:
    """Drop unread nodes, and check the links; the code of the module stays old until `recompile`."""
    module.graph.eliminate_dead_code()
    module.graph.lint()


def finish_graph(module: GraphModule) -> None:
    """Clean the graph after a pass, and recompile the module."""
    clean_graph(module)
    module.recompile()
