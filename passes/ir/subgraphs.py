"""Contractions inside of higher-order operators: torch.cond, map, scan, while_loop and others hold further graphs.

Passes do not enter these graphs. The plan lists the contractions inside.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.arguments import list_arguments
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import find_value, get_input, is_backward, module_path
from qcompiler.passes.ir.opaque import explain_call, is_reached
from qcompiler.passes.ir.views import VIEWS

#: input of a subgraph → the parameter of the model
_Parameters: TypeAlias = Mapping[Node, str]


@dataclasses.dataclass(frozen=True)
class Inside:
    """A contraction in the subgraph of a higher-order operator."""

    #: aten.addmm.default
    operator: str
    #: the path of the layer, if known
    module: str
    #: `addmm in true_graph_0 of cond`, from the inside out
    place: str
    is_backward: bool

    @property
    def reason(self) -> str:
        """The reason for float, for the plan."""
        half = "backward" if self.is_backward else "forward"
        return f"inside of a higher-order operator, in the {half} half: {self.place}"


def contractions_inside(module: GraphModule) -> Iterator[Inside]:
    """Yield every contraction of every subgraph of a joint graph, and of the subgraphs of these."""
    for node in module.graph.nodes:
        yield from _enter_subgraphs(module, node, {}, "", is_backward(node))


def _enter_subgraphs(
    outer: GraphModule, node: Node, known: _Parameters, place: str, backward: bool
) -> Iterator[Inside]:
    """Yield the contractions in the subgraphs of one node."""
    for source in dict.fromkeys(node.all_input_nodes):
        inner = getattr(outer, str(source.target), None) if source.op == "get_attr" else None
        if node.op == "call_function" and isinstance(inner, GraphModule):
            parameters = _match_inputs(inner, node, known)
            here = f"{source.target} of {node.name}{f', {place}' if place else ''}"
            for inside in inner.graph.nodes:
                if is_reached(inside.target) or explain_call(inside.target, *_get_values(inside)):
                    path = _find_module(inside, parameters) or module_path(node)
                    yield Inside(str(inside.target), path, f"{inside.name} in {here}", backward)
                yield from _enter_subgraphs(inner, inside, parameters, here, backward)


def _get_values(node: Node) -> tuple[list[Any], Any]:
    """Return the fake values that a node reads, and the fake values of the results."""
    return [find_value(source) for source in node.all_input_nodes], find_value(node)


def _match_inputs(inner: GraphModule, node: Node, known: _Parameters) -> _Parameters:
    """Return the parameters among the inputs of a subgraph: the last tensors among the arguments of the operator."""
    arguments = [source for source in list_arguments(node) if isinstance(source, Node)]
    given = [source for source in arguments if source.op != "get_attr"]
    placeholders = list(inner.graph.find_nodes(op="placeholder"))
    pairs = zip(reversed(placeholders), reversed(given), strict=False)
    return {inside: name for inside, source in pairs if (name := _find_parameter(source, known))}


def _find_parameter(node: Node, known: _Parameters) -> str:
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    fact = get_input(node)
    return fact.name if fact is not None and fact.kind is InputKind.PARAMETER else known.get(node, "")


def _find_module(node: Node, known: _Parameters) -> str:
    """Return the module that owns a weight of the contraction, else the one that traced the contraction."""
    names = [name for source in node.all_input_nodes if (name := _find_parameter(source, known))]
    return names[0].rpartition(".")[0] if names else module_path(node)
