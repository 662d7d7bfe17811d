"""Models whose branches or sizes follow from the values of a tensor, which no graph has: the line and the layer."""

import linecache
import os
import traceback
from typing import Final

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

import qcompiler
from qcompiler.passes.ir.meta import find_value, iterate_contractions, module_path, source_line

#: the folders whose lines are none of the model
_LIBRARIES: Final = tuple(os.path.dirname(str(library.__file__)) + os.sep for library in (torch, qcompiler))
_BRANCH: Final = (
    "a branch or a size follows from the values of a tensor, and a graph has no values; valid: torch.where in place of "
    "a branch, sizes that follow from shapes"
)
_SIZE: Final = (
    "number of elements follows from values, and a quantizer needs a known shape; valid: a mask "
    "that multiplies, or torch.where, so that all elements stay"
)


def explain_branch(model: nn.Module, error: BaseException) -> str:
    """Return the line of the model that asked for the values of a tensor, and the layer; empty for other errors."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        return ""
    names = {id(module): name for name, module in model.named_modules()}
    path, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = names.get(id(frame.f_locals.get("self")), path)
        file = frame.f_code.co_filename
        if os.path.isfile(file) and not file.startswith(_LIBRARIES):
            line = f"{file}:{number} ({linecache.getline(file, number).strip()})"
    return f"{path and f'{path}, '}{line or 'an unknown line'}: {_BRANCH}"


def explain_size(graph: Graph, error: BaseException | None) -> str:
    """Return the first layer that reads a tensor of such a size, and the line that made it; empty for other errors."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        return ""
    first = next(filter(_has_unknown_size, graph.nodes), None)
    readers = (node for node, _ in iterate_contractions(graph) if any(map(_has_unknown_size, node.all_input_nodes)))
    layer = next(readers, first)
    path = module_path(layer) if layer is not None else ""
    line = source_line(first) if first is not None else ""
    return f"{path or 'the model'}: reads a tensor, made at {line or 'an unknown line'}, whose {_SIZE}"


def _has_unknown_size(node: Node) -> bool:
    """Return True for a tensor whose sizes no input decides."""
    value = find_value(node)
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))
