"""The joint graph as a networkx.MultiDiGraph, which drawings, tables and queries read; attributes: docs/inspect.md."""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Final

import networkx
import torch
from torch.fx import Graph, Node

from qcompiler.compiler.capture import Captured
from qcompiler.compiler.plan import describe_contraction
from qcompiler.compiler.rewrite import saved_size
from qcompiler.compiler.stages import Stage
from qcompiler.compiler.torch_compat import list_symbols
from qcompiler.passes.ir.arguments import list_arguments, number_arguments
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.facts import Contraction, InputKind
from qcompiler.passes.ir.meta import (
    find_value,
    get_contraction,
    get_input,
    get_owner,
    is_backward,
    is_size,
    source_line,
)
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.ir.views import is_view
from qcompiler.runtime import ops

#: the operators of quantizers → the kind of node for a reader of the graph
_KINDS: Final = {
    ops.QUANTIZE: "quantizer",
    ops.SCALE: "scale",
    ops.CHECKED: "scale",
    ops.ZERO_POINT: "scale",
    ops.DEQUANTIZE: "dequantizer",
    ops.PACK: "packing",
    ops.UNPACK: "packing",
    ops.IN_RANGE: "mask",
    ops.UPDATE: "range",
    ops.DRAW_KEY: "key",
    ops.ROTATE: "rotation",
    operator.getitem: "item",
}
#: kinds that hold the same tensor as their first argument, in another form
CARRIERS: Final = frozenset({"packing", "dequantizer", "view", "item"})

#: parts of a quantizer: one node, also if backward makes the same codes again
_AGAIN: Final = frozenset({ops.SCALE, ops.ZERO_POINT, ops.QUANTIZE, ops.PACK, ops.CHECKED})


def build_network(stages: Sequence[Stage]) -> "networkx.MultiDiGraph[str]":
    """Return one stage of every captured graph as one directed graph; an edge for every argument of every node.

    Returns:
        Nodes have kind, lane, op, module, shape, dtype, bytes, source; quantizers and contractions have more. With
        several captured graphs the names of nodes begin with the number of theirs: `2:mm`.
    """
    graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph(stage=stages[0].name, graphs=len(stages))
    for number, stage in enumerate(stages, start=1):
        _Builder(graph, f"{number}:" if len(stages) > 1 else "", stage).run()
    for node, data in graph.nodes(data=True):
        if data["kind"] == "quantizer":
            found = (reader for reader, _ in operand_readers(graph, node))
            data["consumers"] = tuple(reader for reader in found if not graph.nodes[reader]["recomputed"])
            _place_quantizer(data, [graph.nodes[reader] for reader in data["consumers"]])
    _settle_sums(graph)
    return graph


def iterate_tensor_readers(graph: "networkx.MultiDiGraph[str]", node: str) -> Iterator[tuple[str, int, bool]]:
    """(reader, argument, saved on the way) of a tensor, through views, packing and dequantizers, in graph order."""
    for _, reader, data in graph.out_edges(node, data=True):
        if graph.nodes[reader]["kind"] not in CARRIERS:
            yield reader, data["arg"], data["saved"]
        elif data["arg"] == 0:
            yield from (
                (found, arg, saved or data["saved"]) for found, arg, saved in iterate_tensor_readers(graph, reader)
            )


def _place_quantizer(quantizer: dict[str, Any], consumers: Sequence[dict[str, Any]]) -> None:
    """Puts a quantizer into the innermost module around all its consumers; weights have no source line of their own."""
    if consumers:
        paths = [consumer["module"].split(".") for consumer in consumers]
        same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        quantizer["module"] = ".".join(parts[0] for parts in same)
        quantizer["source"] = quantizer["source"] or consumers[0]["source"]


def _settle_sums(graph: "networkx.MultiDiGraph[str]") -> None:
    """Gives nodes of no module, sums of gradients, to the module of the reader."""
    for node in reversed(list(graph)):
        if graph.nodes[node]["module"] is None:
            found = (graph.nodes[reader]["module"] for _, reader in graph.out_edges(node))
            graph.nodes[node]["module"] = next((module for module in found if module is not None), "")


def operand_readers(graph: "networkx.MultiDiGraph[str]", node: str) -> Iterator[tuple[str, int]]:
    """(contraction, argument) for every operand that a quantizer gives."""
    for reader, arg, _ in iterate_tensor_readers(graph, node):
        if arg in {operand["arg"] for operand in graph.nodes[reader].get("operands", ())}:
            yield reader, arg


class _Builder:
    """Adds one captured graph."""

    def __init__(self, graph: "networkx.MultiDiGraph[str]", prefix: str, stage: Stage) -> None:
        self.graph, self.prefix, self.stage = graph, prefix, stage
        self.names: dict[Node, str] = {}
        #: parts of quantizers by `describe_call`; names of the halves do not tell, since another node may bear one
        self.calls: dict[str | None, str] = {}
        self.saved = set(stage.saved or ())
        self.free = _find_free(stage.captured)

    def run(self) -> None:
        captured, stage = self.stage.captured, self.stage
        outputs = _name_outputs(captured)
        if stage.backward is None:
            self.add_graph(stage.graph, outputs)
            return
        forward = list_outputs(stage.graph)
        self.add_graph(stage.graph, outputs[: captured.forward_outputs], len(forward) - len(stage.saved or ()))
        held = list(stage.backward.find_nodes(op="placeholder"))
        self.names |= {inside: self.names[node] for inside, node in zip(held, stage.saved or (), strict=False)}
        self.add_graph(stage.backward, outputs[captured.forward_outputs :])

    def add_graph(self, graph: Graph, outputs: Sequence[tuple[str, str]], count: int | None = None) -> None:
        """One graph; `count` of the outputs go to the user, the others are saved."""
        for node in graph.nodes:
            if node.op == "output":
                self.add_outputs(list_outputs(graph)[:count], outputs)
            elif node not in self.names:
                self.add_node(node)

    def add_node(self, node: Node) -> None:
        backward = is_backward(node) if self.stage.backward is None else node.graph is self.stage.backward
        call = self.describe_call(node) if node.target in _AGAIN else None
        if call in self.calls and node.graph is self.stage.backward:
            self.names[node] = self.calls[call]
            self.graph.nodes[self.calls[call]]["again"] = True
            return
        name = self.prefix + node.name
        recomputed = name in self.graph
        self.names[node] = name = f"{name}@backward" if recomputed else name
        data = _describe_node(node, self.free) | {
            "recomputed": recomputed,
            "again": False,
            "lane": "backward" if backward else "forward",
        }
        data |= {"saved": node in self.saved, "saved_bytes": saved_size(node) if node in self.saved else 0}
        arguments = list(number_arguments(node))
        if (
            data["kind"] == "operator"
            and not data["saved"]
            and all(self.kind(source) == "constant" for _, source in arguments)
        ):
            data["kind"] = "constant"
        if call is not None:
            self.calls[call] = name
        if recomputed and data["kind"] == "contraction":
            data["name"] += ", recomputed"
        self.graph.add_node(name, **data)
        for arg, source in arguments:
            self.connect(source, name, arg)

    def describe_call(self, node: Node) -> str:
        """Return operator and arguments, nodes by their names here."""
        arguments = [self.names[one] if isinstance(one, Node) else one for one in list_arguments(node)]
        return f"{node.target}{arguments}"

    def kind(self, node: Node) -> str:
        return str(self.graph.nodes[self.names[node]]["kind"])

    def connect(self, source: Node, name: str, arg: int) -> None:
        start = self.names[source]
        lanes = self.graph.nodes[start]["lane"], self.graph.nodes[name]["lane"]
        saved = lanes == ("forward", "backward") and not self.graph.nodes[start]["again"]
        operand: dict[str, Any] = next((o for o in self.graph.nodes[name].get("operands", ()) if o["arg"] == arg), {})
        data = {"arg": arg, "saved": saved, "bytes": self.graph.nodes[start]["bytes"]}
        self.graph.add_edge(start, name, arg, operand=operand.get("name", ""), kept=operand.get("kept", ""), **data)

    def add_outputs(self, results: Sequence[Any], named: Sequence[tuple[str, str]]) -> None:
        for index, result in enumerate(results):
            if not isinstance(result, Node):
                continue
            is_range = result.target is ops.UPDATE or index >= len(named)
            label, module = (f"range {result.name}", "") if is_range else named[index]
            source = self.graph.nodes[self.names[result]]
            data = {key: source[key] for key in ("lane", "shape", "dtype", "bytes", "source")}
            data |= {"kind": "range output" if is_range else "output", "op": "output", "name": label, "module": module}
            name = f"{self.prefix}{label}"
            self.graph.add_node(name, **data, saved=False, saved_bytes=0, recomputed=False, again=False)
            self.connect(result, name, 0)


def _find_free(captured: Captured) -> frozenset[str]:
    """Return the symbols of the free dimensions of an export; none in training.

    The size of a random state is a symbol too, which no input has; its value is known.
    """
    inputs = map(find_value, captured.module.graph.find_nodes(op="placeholder"))
    sizes = (size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape)
    return frozenset(symbol for size in sizes for symbol in list_symbols(size))


def _describe_node(node: Node, free: frozenset[str]) -> dict[str, Any]:
    """Return the kind of a node, without the place."""
    fact, contraction = get_input(node), get_contraction(node)
    kind = str(fact.kind) if fact is not None else _KINDS.get(node.target) or _name_kind(node)
    data = {
        "kind": kind,
        "op": _name_operator(node),
        "name": "" if fact is None else fact.name,
        "module": get_owner(node),
    }
    data |= _describe_tensor(find_value(node), free) | {"source": source_line(node)}
    if contraction is not None:
        return data | _describe_contraction(contraction) | {"elements": _count_elements(node, free)}
    return data | _describe_quantizer(node) if kind == "quantizer" else data


def _name_kind(node: Node) -> str:
    """Return the kind of a node that is neither a described input nor one of our operators."""
    if node.op == "placeholder":
        return "key"
    return "view" if is_view(node) else "size" if is_size(node) else "operator"


def _name_operator(node: Node) -> str:
    target = node.target
    name = str(target) if isinstance(target, str) or hasattr(target, "_schema") else target.__name__
    return node.op if node.op == "placeholder" else name.removesuffix(".default")


def _describe_tensor(value: Any, free: frozenset[str]) -> dict[str, Any]:
    """Return shape, dtype, bytes; of an operator with several results the sum over all.

    A free dimension has its symbol, `s31`, and bytes that depend on it are 0.
    """
    if isinstance(value, torch.Tensor):
        shape, dtype = _list_sizes(value, free), str(value.dtype).removeprefix("torch.")
        return {"shape": shape, "dtype": dtype, "bytes": _multiply_known(shape) * value.element_size()}
    parts = [_describe_tensor(part, free) for part in value] if isinstance(value, list | tuple) else []
    return {"shape": (), "dtype": "", "bytes": sum(part["bytes"] for part in parts)}


def _list_sizes(value: torch.Tensor, free: frozenset[str]) -> tuple[int | str, ...]:
    return tuple(str(size) if free.intersection(list_symbols(size)) else int(size) for size in value.shape)


def _multiply_known(sizes: Sequence[int | str]) -> int:
    """Return the product of the sizes; 0 if one is free."""
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else 0


def _count_elements(node: Node, free: frozenset[str]) -> int:
    """How many numbers a contraction makes, 0 if a dimension is free.

    One that torch writes with several results makes one of them here.
    """
    made = find_value(node)
    parts = made if isinstance(made, list | tuple) else [made]
    sizes = (_list_sizes(part, free) for part in parts if isinstance(part, torch.Tensor))
    return max(map(_multiply_known, sizes), default=0)


def _describe_contraction(fact: Contraction) -> dict[str, Any]:
    operands = tuple(
        {"arg": o.arg, "name": o.name, "role": str(o.role), "axis": o.contracted, "kept": o.kept, "asked": o.asked}
        for o in fact.operands
    )
    kept = [f"{o.name}: {o.kept}" for o in fact.operands if o.kept and not fact.is_bias]
    return {
        "kind": "contraction",
        "site": fact.site,
        "operator": fact.operator,
        "name": fact.site if fact.kept else describe_contraction(fact),
        "product": "bias-gradient" if fact.is_bias else str(fact.product),
        "operands": operands,
        "kept": fact.kept or "; ".join(kept),
    }


def _describe_quantizer(node: Node) -> dict[str, Any]:
    quantizer = Quantizer(node)
    spec, name = quantizer.spec, quantizer.site
    fields = {key: str(getattr(spec, key)) for key in ("format", "scale", "block", "rounding", "vjp", "range")}
    return {
        "name": name,
        "role": str(get_role(name)),
        "spec": quantizer.text,
        "layout": quantizer.layout,
        **fields,
        "bits": spec.format.bits,
    }


def _name_outputs(captured: Captured) -> list[tuple[str, str]]:
    """(name, module path) of every output of a captured graph, in order."""
    inside = {InputKind.PARAMETER, InputKind.BUFFER}
    owners = [fact.name.rpartition(".")[0] if fact.kind in inside else "" for fact in captured.inputs]
    mutated = [(f"new value of {captured.inputs[index].name}", owners[index]) for index in captured.mutated]
    results = [(f"output {index}", "") for index in range(len(captured.differentiable))]
    gradients = [(f"gradient of {fact.name}", path) for fact, path in zip(captured.inputs, owners, strict=True)]
    return [*mutated, *results, *gradients]


#: kinds of inputs of a graph
INPUTS: Final = frozenset(map(str, InputKind))
