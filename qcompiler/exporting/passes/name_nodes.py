"""Nodes are named after the layer that computes them."""

import dataclasses
import json
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.exported_model import ExportedModel

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclasses.dataclass(frozen=True)
class NameNodes:
    """Gives the nodes of a module its path: `layer1.0.conv1/Conv`, then `layer1.0.conv1/Conv#2`.

    Nodes of a quantizer keep the name of their site. The notes of torch's exporter, which name files, go.
    """

    name: ClassVar[str] = "name-nodes"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of nodes with a new name, or without notes they had."""
        taken: dict[str, int] = {}
        return sum([_rename_node(node, taken) for node in subject.graph])


def _rename_node(node: ir.Node, taken: dict[str, int]) -> bool:
    """Give a node its name; counts on a name that another node has."""
    name = _choose_name(node)
    count = taken[name] = taken.get(name, 0) + 1
    before, node.name = node.name, name if count == 1 else f"{name}#{count}"
    notes = [key for key in node.metadata_props if key.startswith("pkg.")]
    for key in notes:
        del node.metadata_props[key]
    return bool(notes) or node.name != before


def _choose_name(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if "site" not in node.metadata_props and scopes:
        path = json.loads(scopes.replace("'", '"'))[-2:-1]
        if path and path[0]:
            return f"{path[0]}/{node.op_type}"
    return node.name or node.op_type
