"""An ONNX graph as stable text, for golden tests and `show`; that of torch.fx: passes/ir/text.py."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir

#: numbers of a constant that its line shows
_SHOWN: Final = 4
#: below this every whole number is a float64
_WHOLE: Final = 2.0**53


def model_text(model: ir.Model) -> str:
    """Return the main graph, one input, constant or node a line, and the names of the functions of the model."""
    functions = [f"function {domain}.{name}" for domain, name, _ in model.functions]
    return "\n".join([*_list_lines(model.graph), *functions]) + "\n"


def _list_lines(graph: ir.Graph) -> Iterator[str]:
    """Yield the lines of a graph; the graphs inside of a node stand below it, indented."""
    for value in graph.inputs:
        yield f"{_show_result(value)} = input"
    for value in graph.initializers.values():
        note = f"  # {value.doc_string}" if value.doc_string else ""
        yield f"{_show_result(value)} = constant {_show_numbers(value.const_value)}".rstrip() + note
    for node in graph:
        yield _show_node(node)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield f"  {attribute.name}:"
                yield from (f"  {line}" for line in _list_lines(attribute.as_graph()))
    yield f"return [{', '.join(map(_show_name, graph.outputs))}]"


def _show_node(node: ir.Node) -> str:
    """Return `%y : FLOAT[2,4] = Gemm(%x, %w, transB=1)  # fc/Gemm`."""
    results = ", ".join(map(_show_result, node.outputs))
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    given = (f"{name}={_show_attribute(one)}" for name, one in sorted(node.attributes.items()))
    name = f"  # {node.name}" if node.name else ""
    return f"{results} = {operator}({', '.join([*map(_show_name, node.inputs), *given])}){name}"


def _show_name(value: ir.Value | None) -> str:
    return "None" if value is None else f"%{value.name}"


def _show_result(value: ir.Value) -> str:
    """Return the name, type and shape of a value; the exporter knows neither of some values between nodes."""
    if value.dtype is None and value.shape is None:
        return _show_name(value)
    kind = "?" if value.dtype is None else value.dtype.name
    shape = "[…]" if value.shape is None else f"[{','.join(str(size) for size in value.shape)}]"
    return f"{_show_name(value)} : {kind}{shape}"


def _show_attribute(attribute: ir.Attr) -> str:
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.GRAPH:
        return "…"
    if attribute.type == ir.AttributeType.TENSOR:
        return f"{value.dtype.name}[{','.join(map(str, value.shape))}] {_show_numbers(value)}"
    return str(list(value)) if isinstance(value, list | tuple) else str(value)


def _show_numbers(tensor: ir.TensorProtocol | None) -> str:
    """Return the first numbers of a constant."""
    if tensor is None:
        return ""
    first = tensor.numpy().reshape(-1)[:_SHOWN]
    texts = map(str, first) if first.dtype.kind in "OSU" else map(_show_number, first.astype(np.float64).tolist())
    return " ".join([*texts, *(["…"] if tensor.size > _SHOWN else [])])


def _show_number(number: float) -> str:
    """Return whole numbers whole, such as sizes of a shape; others to four digits."""
    return f"{number:.0f}" if number.is_integer() and abs(number) < _WHOLE else f"{number:.4g}"
