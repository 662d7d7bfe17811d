"""The text of everything that a capture depends on. Equal texts mean equal captures; what has no such text is refused.

A text is long, and becomes a hash in a `Key`.
"""

import dataclasses
import enum
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompiler.compiler.cache import cache_compat
from qcompiler.passes.ir.meta import get_example, list_origins
from qcompiler.runtime import ops
from qcompiler.runtime.errors import QCompilerError

#: types of operators of the dispatcher: one overload, and all overloads of a name
OPERATORS: Final = (type(ops.SCALE), type(torch.ops.aten.add))
#: operators of torch; others may have gradients in Python, which change without a new version
_NAMESPACES: Final = frozenset({"aten", "prims"})
#: types of which equal values mean the same; floats apart, as -0.0 == 0.0
_CONSTANTS: Final = frozenset(
    {bool, int, str, bytes, complex, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)
#: elements of a constant tensor whose values become part of a key
_MOST_ELEMENTS: Final = 4096


class UncachedError(QCompilerError):
    """Something of which equal texts may mean something else; the message says what."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Stands for all that a kept value depends on."""

    #: what is kept: `capture`
    kind: str
    #: the function that was captured, for the log: `forward at model.py:12`
    place: str
    #: 64 letters, which name the file
    hash: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.place}"

    def extend(self, kind: str, *texts: str) -> "Key":
        """Return the key of a value that is made of the value of this key, and depends on more texts."""
        return Key(kind, self.place, hash_texts(self.hash, kind, *texts))


def hash_texts(*texts: str) -> str:
    """Return 64 letters that stand for texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def describe_graph(module: GraphModule, path_of: Callable[[str], str] = str) -> str:
    """Return a graph of Dynamo as text: each call, what it gives, and which line of which module it comes from.

    Args:
        module: the graph.
        path_of: returns the name of a module by the place at which Dynamo found the module.

    Raises:
        UncachedError: a call of a function that is not torch's, a graph or a constant that has no text.
    """
    if reason := cache_compat.explain_uncached(module):
        raise UncachedError(reason)
    names = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
    attributes = [f"{name}: {_describe_attribute(operator.attrgetter(name)(module))}" for name in names]
    return "\n".join([*attributes, *(_describe_node(node, path_of) for node in module.graph.nodes)])


def describe_inputs(inputs: Sequence[Any]) -> str:
    """Return the inputs of a graph as text: types, forms and gradients. No values of tensors.

    Raises:
        UncachedError: an input has no text.
    """
    return "\n".join(map(_describe_input, inputs))


def describe_value(value: Any) -> str:
    """Return an argument of a call, or a field of a fact, as text.

    Raises:
        UncachedError: it has none.
    """
    kind = type(value)
    if isinstance(value, Node):
        return f"%{value.name}"
    if kind is float:
        return value.hex()  # type: ignore[no-any-return]
    if kind in _CONSTANTS:
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, slice):
        return f"slice{describe_value((value.start, value.stop, value.step))}"
    if isinstance(value, list | tuple):
        return f"{kind.__name__}({', '.join(map(describe_value, value))})"
    if isinstance(value, Mapping):
        return f"{kind.__name__}({', '.join(f'{describe_value(k)}: {describe_value(v)}' for k, v in value.items())})"
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, OPERATORS):
        return _describe_operator(value)
    raise UncachedError(f"a {kind.__name__}: {str(value)[:80]}")


def _describe_node(node: Node, path_of: Callable[[str], str]) -> str:
    target = node.target if isinstance(node.target, str) else _describe_function(node.target)
    modules, *others = list_origins(node)
    facts = [describe_value(one) for one in (get_example(node), *others)]
    call = f"{describe_value(node.args)}, {describe_value(node.kwargs)}"
    return f"{node.name} = {node.op} {target} {call} in {[*map(path_of, modules)]} {' '.join(facts)}"


def _describe_function(target: Any) -> str:
    """Return the name of a function, which `explain_uncached` has found to be torch's or Python's own."""
    if isinstance(target, OPERATORS):
        return _describe_operator(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _describe_operator(called: Any) -> str:
    name = str(called)
    if name.partition(".")[0] not in _NAMESPACES:
        raise UncachedError(f"operator {name}, which is not torch's own")
    return name


def _describe_attribute(value: Any) -> str:
    if isinstance(value, GraphModule):
        return f"({describe_graph(value)})"
    if isinstance(value, Tensor) and value.numel() <= _MOST_ELEMENTS:
        return f"{_describe_tensor(value)} {value.tolist()}"
    raise UncachedError(f"a constant: {type(value).__name__}")


def _describe_input(given: Any) -> str:
    if not isinstance(given, Tensor):
        return describe_value(given)
    kind = f"{isinstance(given, nn.Parameter)} {given.is_inference()}"
    return f"{_describe_tensor(given)} {given.storage_offset()} {kind}"


def _describe_tensor(value: Tensor) -> str:
    """Return type, form and gradient of a tensor, fake or not."""
    sizes = [*value.shape, *value.stride()] if value.layout is torch.strided else [None]
    if any(type(size) is not int for size in sizes) or value.is_conj() or value.is_neg():
        raise UncachedError(f"a tensor of unusual form: {value.layout}, {tuple(value.shape)}")
    kind = cache_compat.explain_tensor_type(value)
    if kind:
        raise UncachedError(kind)
    form = f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return f"{form} {value.requires_grad} {value.is_leaf}"
