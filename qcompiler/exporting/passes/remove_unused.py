"""Nodes and constants that nothing reads go."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompiler.exporting.exported_model import ExportedModel


@dataclasses.dataclass(frozen=True)
class RemoveUnused:
    """Removes every node, and every constant, on which no output of the graph depends."""

    name: ClassVar[str] = "remove-unused"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of nodes and constants."""
        before = _count_parts(subject.graph)
        RemoveUnusedNodesPass()(subject.model)
        return before - _count_parts(subject.graph)


def _count_parts(graph: ir.Graph) -> int:
    return len(list(graph.all_nodes())) + len(graph.initializers)
