"""Graphs as bytes, and back: calls, names, fake values with the memory that they share, and facts of the passes."""

import io
import operator
import pickle
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from qcompiler.compiler import torch_compat
from qcompiler.compiler.cache.texts import OPERATORS
from qcompiler.passes.ir.edit import make_module
from qcompiler.passes.ir.inference import FakeTensor, FakeTensorMode, describe_tensor, make_fake, make_memory
from qcompiler.passes.ir.meta import list_portable_facts, set_facts
from qcompiler.runtime.errors import QCompilerError


class NotPortableError(QCompilerError):
    """A graph holds something that another process cannot be given."""


def write_graphs(value: Any) -> bytes:
    """Return a value that holds graphs as bytes.

    Raises:
        Exception: something in it cannot be written; the type depends on what.
    """
    with io.BytesIO() as stream:
        _Writer(stream, pickle.HIGHEST_PROTOCOL).dump(value)
        return stream.getvalue()


def read_graphs(data: bytes, mode: FakeTensorMode) -> Any:
    """Return the value that `write_graphs` wrote, with its fake tensors in a mode.

    Raises:
        Exception: the bytes are damaged, or name something that is no more; the type depends on what.
    """
    with io.BytesIO(data) as stream:
        return _Reader(stream, mode).load()


class _Memory:
    """The memory of a fake tensor, in bytes; tensors that share memory share one."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __reduce__(self) -> Any:
        return make_memory, (self._size,)


class _Writer(pickle.Pickler):
    """Writes a node as the call that makes it again. Pickle writes a number for what is written already."""

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        #: memory of fake tensors, by address; the tensors live as long as the value that is written
        self._memories: dict[int, _Memory] = {}

    def reducer_override(self, value: Any) -> Any:
        """Return the function and the arguments that make a value again; NotImplemented: as pickle does."""
        if isinstance(value, Node):
            call = (value.op, value.name, value.target, value.args, value.kwargs)
            return _make_node, (value.graph, *call, list_portable_facts(value))
        if isinstance(value, FakeTensor):
            return self._reduce_fake(value)
        if isinstance(value, GraphModule):
            return self._reduce_module(value)
        if isinstance(value, Graph):
            return Graph, ()
        if isinstance(value, FakeTensorMode):
            return _give_mode, ()
        if isinstance(value, OPERATORS):
            return _find_operator, (str(value),)
        if isinstance(value, torch_compat.HigherOrderOperator):
            return _find_operator, (f"higher_order.{value.name()}",)
        if isinstance(value, type) and issubclass(value, nn.Module):
            return str, (value.__qualname__,)  # of the user, in the stack of modules of a node
        return NotImplemented

    def _reduce_fake(self, value: FakeTensor) -> Any:
        form = describe_tensor(value)
        if form is None:
            raise NotPortableError(f"a tensor of unusual form: {value}")
        storage = value.untyped_storage()
        memory = self._memories.setdefault(storage._cdata, _Memory(storage.nbytes()))
        return make_fake, (value.fake_mode, memory, form, value.storage_offset(), value.constant)

    def _reduce_module(self, module: GraphModule) -> Any:
        names = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
        attributes = {name: operator.attrgetter(name)(module) for name in names}
        return _make_module, (attributes, module.graph, list(module.graph.nodes))


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, mode: FakeTensorMode) -> None:
        super().__init__(stream)
        self._mode = mode

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what a name in the bytes means; `_give_mode` returns the mode of this reader."""
        found = super().find_class(module_name, global_name)
        return (lambda: self._mode) if found is _give_mode else found


def _give_mode() -> FakeTensorMode:
    """Stand for the mode of fake tensors, which the reader has."""
    raise NotPortableError("a mode of fake tensors, without a reader that has one")


def _make_node(graph: Graph, op: str, name: str, target: Any, args: Any, kwargs: Any, facts: dict[str, Any]) -> Node:
    node = graph.create_node(op, target, args, kwargs, name=name)
    if node.name != name:
        raise NotPortableError(f"a node called {name!r} cannot be made again")
    set_facts(node, facts)
    return node


def _make_module(attributes: dict[str, Any], graph: Graph, nodes: list[Node]) -> GraphModule:
    return make_module(attributes, graph)


def _find_operator(name: str) -> Any:
    """Return the operator, or the operators of one name: `aten.add.Tensor`, `aten.add`, `higher_order.cond`."""
    return operator.attrgetter(name)(torch.ops)
