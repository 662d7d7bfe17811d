"""The other names of a constant: torch's exporter merges equal constants under the first name, of whatever layer."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import onnx_ir as ir

from qcompiler.exporting.edits import read_array

#: type, shape and bytes of a constant
_Key: TypeAlias = tuple[ir.DataType, tuple[Any, ...], bytes]


def list_read(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the constants that something reads, by name."""
    return {name: value for name, value in graph.initializers.items() if value.uses()}


def note_merged(before: Mapping[str, ir.Value], graph: ir.Graph) -> None:
    """Write into each constant of a graph the names of equal ones that are gone: `also 2.weight`.

    Args:
        before: the constants of the graph before torch merged them.
    """
    gone: dict[_Key, list[str]] = {}
    for name, value in before.items():
        if name not in graph.initializers and value.const_value is not None:
            gone.setdefault((*_describe_form(value), read_array(value).tobytes()), []).append(name)
    forms = {key[:2] for key in gone}
    for value in graph.initializers.values():
        if value.const_value is not None and (form := _describe_form(value)) in forms:
            names = gone.pop((*form, read_array(value).tobytes()), [])  # to the first of several equal ones
            if names:
                value.doc_string = f"also {', '.join(names)}"


def _describe_form(value: ir.Value) -> tuple[ir.DataType, tuple[Any, ...]]:
    """Return type and shape of a constant."""
    tensor = value.const_value
    assert tensor is not None
    return tensor.dtype, tuple(tensor.shape)
