"""Facts of the nodes in a graph of Dynamo: sizes and numbers without a value, nested tensors, lines of the user."""

import re
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qcompiler.compiler.torch_compat import list_leaves
from qcompiler.passes.ir.meta import get_example, get_graph_argument, get_stack_trace

#: file and line in a traceback
_LINE: Final = re.compile(r'File "([^"]+)", line (\d+)')


def name_source(source: Any) -> str:
    """Return the source of a value in Dynamo as text; empty if nothing is known."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def placeholder_source(node: Node) -> str:
    """The expression behind a placeholder of a Dynamo graph: `L['self']._modules['fc']._parameters['weight']`."""
    return name_source(getattr(get_graph_argument(node), "source", None))


def is_number(node: Any) -> bool:
    """Return True for an input of a Dynamo graph that is a float for its caller."""
    return isinstance(node, Node) and getattr(get_graph_argument(node), "is_tensor", True) is False


def assigns_data(node: Node) -> bool:
    """Return True for `parameter.data = value` in a Dynamo graph: `set_`, or `shallow_copy_data_` since torch 2.15."""
    return node.target is torch.Tensor.set_ or str(node.target) == "aten.shallow_copy_data_"


def find_symbolic_size(module: GraphModule) -> str | None:
    """Return the operator and the line of a tensor with a size that is no number; None without one."""
    return next((_describe_node(node) for node in module.graph.nodes if any(_symbols_of(get_example(node)))), None)


def find_data_number(module: GraphModule) -> str | None:
    """Return the line at which a size or number of a Dynamo graph depends on data of a tensor; None without one."""
    for node in module.graph.nodes:
        example = get_example(node)
        numbers = [example] if isinstance(example, torch.SymInt | torch.SymFloat | torch.SymBool) else []
        if any(map(free_unbacked_symbols, [*numbers, *_symbols_of(example)])):
            return _describe_node(node)
    return None


def _symbols_of(example: Any) -> list[Any]:
    tensors = [value for value in list_leaves(example) if isinstance(value, torch.Tensor)]
    return [size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)]


def find_nested(module: GraphModule) -> str | None:
    """Return the operator and the line of the first nested tensor of a Dynamo graph; None without one."""
    for node in module.graph.nodes:
        if any(isinstance(value, torch.Tensor) and value.is_nested for value in list_leaves(get_example(node))):
            return _describe_node(node)
    return None


def _describe_node(node: Node) -> str:
    """Return `nonzero at model.py:12`; of an input its name alone."""
    lines = _LINE.findall(get_stack_trace(node))
    name = placeholder_source(node) if node.op == "placeholder" else getattr(node.target, "__name__", str(node.target))
    return f"{name} at {':'.join(lines[-1])}" if lines else name


def error_line(error: BaseException) -> str:
    """Return ` at model.py:12`: the innermost line of the user in an error of Dynamo; empty if the error names none."""
    lines = _LINE.findall(str(error).partition("from user code:")[2])
    return f" at {':'.join(lines[-1])}" if lines else ""
