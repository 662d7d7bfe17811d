"""Infer the fake value of a call from the fake values of its arguments."""

import weakref
from collections.abc import MutableMapping
from typing import Any, TypeAlias, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import iterate_arguments, run_call
from qcompiler.passes.ir.meta import find_value, get_inferred_from, get_value, set_inferred_from, set_value
from qcompiler.runtime import ops

#: extents, strides, type and device of a tensor
_Form: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
#: an operator and its arguments, with the form of each tensor
_Call: TypeAlias = tuple[Any, ...]

#: mode → call of one of our operators → the form of the result. A network repeats its layers, and torch takes ten times
#: as long to run a shape rule on fake tensors as to make one fake tensor
_FORMS: MutableMapping[FakeTensorMode, dict[_Call, _Form | None]] = weakref.WeakKeyDictionary()


def infer_value(node: Node) -> None:
    """Computes the fake value of a call from the values of the arguments."""
    mode = fake_mode(node.graph)
    call = describe_call(node)
    form = None if call is None else _FORMS.setdefault(mode, {}).get(call)
    set_value(node, _run_on_fakes(node, mode, call) if form is None else _make_fake(form, mode))
    set_inferred_from(node, _list_values_read(node))


def is_outdated(node: Node) -> bool:
    """Return True if a node that a pass wrote was inferred from values of another form than the present ones."""
    before, now = get_inferred_from(node), _list_values_read(node)
    return len(before) != len(now) or not all(map(_are_alike, before, now))


def _are_alike(old: Any, new: Any) -> bool:
    form = None if old is new else _describe_tensor(old)
    return old is new or (form is not None and form == _describe_tensor(new))


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the mode that the graph's fake tensors belong to."""
    for node in graph.nodes:
        mode = getattr(find_value(node), "fake_mode", None)
        if mode is not None:
            return cast(FakeTensorMode, mode)
    raise ValueError(
        "graph: no node holds a fake tensor; capture it through torch.compile or make_fx(tracing_mode='fake')"
    )


def describe_call(node: Node) -> tuple[Any, ...] | None:
    """Return all that the form of the result depends on; None if it is to be computed anew.

    That is so for operators of torch, whose results may share memory with an argument, and for free dimensions. The
    site of a quantizer is a name alone.
    """
    if getattr(node.target, "namespace", "") != ops.NAMESPACE or node.kwargs:
        return None
    call: list[Any] = [node.target]
    for name, argument in iterate_arguments(node):
        if isinstance(argument, Node):
            form = _describe_tensor(find_value(argument))
            if form is None:
                return None
            call.append(form)
        elif name != "site":
            call += (type(argument), tuple(argument) if isinstance(argument, list | tuple) else argument)
    return tuple(call)


def _describe_tensor(value: Any) -> _Form | None:
    """Return the form of a fake value; None for anything but a strided tensor of known extents."""
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        return None
    shape, strides = tuple(value.shape), value.stride()
    known = all(type(number) is int for number in (*shape, *strides))
    return (shape, strides, value.dtype, value.device) if known else None


def _run_on_fakes(node: Node, mode: FakeTensorMode, call: _Call | None) -> Any:
    """Return the result of the operator on fake tensors, and keep its form for equal calls."""
    with mode, torch.no_grad():
        value = run_call(node, get_value)
    if call is not None:
        _FORMS[mode][call] = _describe_tensor(value)
    return value


def _make_fake(form: _Form, mode: FakeTensorMode) -> FakeTensor:
    """Return a new fake tensor, with memory of its own."""
    shape, strides, dtype, device = form
    return FakeTensor(mode, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)


def _list_values_read(node: Node) -> tuple[Any, ...]:
    return tuple(map(find_value, node.all_input_nodes))
