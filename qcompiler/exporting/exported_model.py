"""An ONNX model in memory and the facts in the file: the subject of the ONNX pipeline."""

import dataclasses
from typing import Any

import onnx_ir as ir

from qcompiler.exporting.blocks import Edges
from qcompiler.runtime.errors import QCompilerError


class StructureError(QCompilerError):
    """A value has no source, or is read before it is computed; names the value and the node that reads it."""


@dataclasses.dataclass(frozen=True)
class ExportedQuantizer:
    """One quantizer in the file."""

    site: str
    #: weight, static or dynamic
    kind: str
    #: the value that it reads, and the one that holds its codes; of a weight only these
    values: tuple[str, ...]
    edges: Edges
    #: the number that was added to the codes of a weight
    shift: int = 0
    #: True for a weight of 8 bits that was asked to stay int8; see shift_of
    saturates: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the metadata of the file."""
        return {"site": self.site, "kind": self.kind, "values": self.values, "shift": self.shift}


@dataclasses.dataclass
class ExportedModel:
    """A model, and the findings of the passes."""

    model: ir.Model
    #: symbol of a free dimension → the name that it gets; empty after the dimensions have their names
    symbols: dict[str, str] = dataclasses.field(default_factory=dict)
    #: in graph order
    quantizers: list[ExportedQuantizer] = dataclasses.field(default_factory=list)
    #: the layers whose biases are added in float behind them, so that no kernel rounds them
    float_biases: list[str] = dataclasses.field(default_factory=list)

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph


def verify_structure(subject: ExportedModel) -> None:
    """Check that every value that is read is there before its reader: the check after each pass.

    Raises:
        StructureError: with the first reader of a value without a source.
    """
    _check_graph(subject.graph, set())


def _check_graph(graph: ir.Graph, outside: set[ir.Value]) -> None:
    """Check a graph, and the graphs inside of its nodes, which read the values of `outside` too."""
    there = {*outside, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in there:
                raise StructureError(
                    f"{node.name or node.op_type}: reads {value.name}, which nothing in front computes"
                )
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _check_graph(attribute.as_graph(), there)
        there.update(node.outputs)
    for value in graph.outputs:
        if value not in there:
            raise StructureError(f"output {value.name}: nothing computes it")
