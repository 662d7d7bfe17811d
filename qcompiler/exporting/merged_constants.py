"""The other names of a constant: torch's exporter merges equal constants under the first name, of whatever layer."""

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.exporting.edits import read_array


def list_read(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the constants that something reads, by name."""
    return {name: value for name, value in graph.initializers.items() if value.uses()}


def note_merged(before: Mapping[str, ir.Value], graph: ir.Graph) -> None:
    """Write into each constant of a graph the names of equal ones that are gone: `also 2.weight`.

    Args:
        before: the constants of the graph before torch merged them.
    """
    others: dict[str, list[str]] = {}
    for name, gone in before.items():
        if name not in graph.initializers and (kept := _find_equal(gone, graph)):
            others.setdefault(kept, []).append(name)
    for kept, names in others.items():
        graph.initializers[kept].doc_string = f"also {', '.join(names)}"


def _find_equal(gone: ir.Value, graph: ir.Graph) -> str:
    """Return the name of the constant that is the same bit for bit; empty without one."""
    tensor = gone.const_value
    if tensor is None:
        return ""
    for name, value in graph.initializers.items():
        other = value.const_value
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            continue
        if read_array(value).tobytes() == read_array(gone).tobytes():
            return name
    return ""
