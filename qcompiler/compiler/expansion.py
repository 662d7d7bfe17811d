"""Expand a graph into the operators that a compiler lowers; equal calls are traced once.

A network repeats its layers: 1,161 calls in both halves of a step of ViT-Tiny are expanded, of 87 kinds. torch takes
milliseconds to trace a call.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qcompiler.passes.ir.arguments import run_call
from qcompiler.passes.ir.inference import Call, FakeTensorMode, describe_call, infer_value
from qcompiler.passes.ir.meta import find_value, has_value, set_value

#: from a function and the fake values that it reads to its nodes
Trace: TypeAlias = Callable[[Callable[..., Any], Sequence[Any]], GraphModule]


def expand_graph(
    module: GraphModule,
    inputs: Sequence[Any],
    mode: FakeTensorMode,
    trace: Trace,
    is_plain: Callable[[Any], bool],
) -> tuple[Graph, dict[str, Any]]:
    """Return a graph that computes the same, with every call replaced by the nodes that tracing makes of it.

    Args:
        module: the graph; it stays as it is.
        inputs: its inputs as fake tensors, of the strides that calls will have.
        mode: the mode of these tensors.
        trace: returns the nodes of a call.
        is_plain: True for operators that tracing leaves as they are.

    Returns:
        The graph, and what its nodes read from a module, by name.
    """
    expansion = _Expansion(module, inputs, mode, trace, is_plain)
    for node in module.graph.nodes:
        expansion.add_node(node)
    return expansion.graph, expansion.attributes


class _Expansion:
    """The graph so far."""

    def __init__(
        self,
        module: GraphModule,
        inputs: Sequence[Any],
        mode: FakeTensorMode,
        trace: Trace,
        is_plain: Callable[[Any], bool],
    ) -> None:
        self.graph = Graph()
        self.attributes: dict[str, Any] = {}
        self._module, self._mode, self._trace, self._is_plain = module, mode, trace, is_plain
        self._inputs = iter(enumerate(inputs))
        #: node of the old graph → its node here; several nodes for a call with several results that was expanded
        self._new: dict[Node, Any] = {}
        self._traced: dict[Call, GraphModule] = {}

    def add_node(self, node: Node) -> None:
        """Add what stands for a node of the old graph."""
        self._new[node] = self._expand_node(node)

    def _expand_node(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._add_input(*next(self._inputs))
        if node.op == "output":
            return self.graph.output(map_arg(node.args[0], self._new.__getitem__))
        if node.op == "get_attr":
            return self._add_attribute(node, self._module)
        if node.target is operator.getitem and not isinstance(self._new[node.all_input_nodes[0]], Node):
            return self._new[node.all_input_nodes[0]][node.args[1]]
        return self._copy_call(node, self._new) if self._is_plain(node.target) else self._expand_call(node)

    def _add_input(self, place: int, value: Any) -> Node:
        """Add an input, named after its place: with names of a model equal graphs would differ in caches."""
        new = self.graph.placeholder(f"arg{place}_1")
        set_value(new, value)
        return new

    def _copy_call(self, node: Node, new: dict[Node, Any]) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), new.__getitem__)
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        copied = self.graph.create_node("call_function", node.target, args, kwargs, name=name)
        if any(not has_value(source) for source in copied.all_input_nodes):
            set_value(copied, find_value(node))  # of a graph that the operator runs; it was traced for this call alone
        else:
            infer_value(copied, self._mode)
        return copied

    def _add_attribute(self, node: Node, module: GraphModule) -> Node:
        name, value = str(node.target), operator.attrgetter(str(node.target))(module)
        if self.attributes.get(name, value) is not value:
            name = f"{name}_{len(self.attributes)}"  # two traced calls may call their constants the same
        self.attributes[name] = value
        new = self.graph.get_attr(name)
        if isinstance(value, torch.Tensor):
            set_value(new, self._mode.from_tensor(value))
        return new

    def _expand_call(self, node: Node) -> Any:
        """Add the nodes that a call becomes, and return the nodes of the results."""
        traced = self._trace_call(node)
        new: dict[Node, Any] = {}
        given = map(self._new.__getitem__, self._list_read(node))
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                new[inner] = next(given)
            elif inner.op == "get_attr":
                new[inner] = self._add_attribute(inner, traced)
            elif inner.op == "call_function":
                new[inner] = self._copy_call(inner, new)
        return map_arg(traced.graph.output_node().args[0], new.__getitem__)

    def _trace_call(self, node: Node) -> GraphModule:
        """Return the nodes that a call becomes; equal calls are traced once."""
        call = describe_call(node, self._get_value, with_site=True)
        traced = self._traced.get(call) if call else None
        if traced is None:
            read = self._list_read(node)

            def run(*given: Any) -> Any:
                values = dict(zip(read, given, strict=True))
                return run_call(node, lambda source: values[source] if source in values else self._get_module(source))

            traced = self._trace(run, [self._get_value(source) for source in read])
            if call:
                self._traced[call] = traced
        return traced

    def _list_read(self, node: Node) -> list[Node]:
        """Return what a call reads but for modules: a higher-order operator runs those."""
        return [source for source in node.all_input_nodes if has_value(self._new[source])]

    def _get_module(self, node: Node) -> Any:
        return self.attributes[str(self._new[node].target)]

    def _get_value(self, node: Node) -> Any:
        return find_value(self._new[node])
