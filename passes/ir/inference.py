"""Infer the fake value of a call from the fake values of its arguments."""

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import iterate_arguments, run_call
from qcompiler.passes.ir.meta import find_value, get_inferred_from, get_value, set_inferred_from, set_value
from qcompiler.runtime import ops

#: extents, strides, type and device of a tensor
TensorForm: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
#: form, first element in memory, and which of the tensors read has that memory; None: memory of its own
_Result: TypeAlias = tuple[TensorForm, int, int | None]
#: results, and the type of the sequence that they came in
_Results: TypeAlias = tuple[type | None, list[_Result]]
#: an operator and its arguments, with the form of each tensor
Call: TypeAlias = tuple[Any, ...]

#: mode → call → its results; None: the operator runs each time. A network repeats its layers, and torch takes 250 µs to
#: run a shape rule on fake tensors, 20 to make one
_KNOWN: MutableMapping[FakeTensorMode, dict[Call, _Results | None]] = weakref.WeakKeyDictionary()

_Operator: Final = type(ops.SCALE)
#: types of arguments of which equal values mean the same
_CONSTANTS: Final = frozenset(
    {bool, int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)


class _UnknownError(Exception):
    """An argument of which equal values may mean something else."""


def infer_value(node: Node, mode: FakeTensorMode | None = None) -> None:
    """Computes the fake value of a call from the values of the arguments; without a mode, in the mode of the graph."""
    mode = fake_mode(node.graph) if mode is None else mode
    call = describe_call(node)
    known = None if call is None else _KNOWN.setdefault(mode, {}).get(call)
    read = _list_values_read(node)
    set_value(node, _run_on_fakes(node, mode, call, read) if known is None else _make_values(known, mode, read))
    set_inferred_from(node, read)


def is_outdated(node: Node) -> bool:
    """Return True if a node that a pass wrote was inferred from values of another form than the present ones."""
    before, now = get_inferred_from(node), _list_values_read(node)
    return len(before) != len(now) or not all(map(_are_alike, before, now))


def _are_alike(old: Any, new: Any) -> bool:
    form = None if old is new else describe_tensor(old)
    return old is new or (form is not None and form == describe_tensor(new))


def find_mode(graph: Graph) -> FakeTensorMode | None:
    """Return the mode that the graph's fake tensors belong to; None without any."""
    modes = (getattr(find_value(node), "fake_mode", None) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the mode that the graph's fake tensors belong to.

    Raises:
        ValueError: the graph has none.
    """
    mode = find_mode(graph)
    if mode is None:
        raise ValueError(
            "graph: no node holds a fake tensor; capture it through torch.compile or make_fx(tracing_mode='fake')"
        )
    return mode


def describe_call(node: Node, read: Callable[[Node], Any] = find_value, *, with_site: bool = False) -> Call | None:
    """Return all that the result of a call depends on but for numbers in tensors; None if that is not known.

    Args:
        node: a call; of operators alone it is known what they do.
        read: returns the value of an argument.
        with_site: with the site of a quantizer that draws random bits; the form of the result does not depend on it.
    """
    if not isinstance(node.target, _Operator):
        return None
    places = {source: place for place, source in enumerate(node.all_input_nodes)}

    def describe(argument: Any) -> Any:
        if isinstance(argument, Node):
            value = read(argument)
            form = describe_tensor(value)
            if form is None:
                raise _UnknownError
            return (places[argument], value.storage_offset(), form)
        if isinstance(argument, list | tuple):
            return tuple([describe(part) for part in argument])
        if type(argument) is float:
            return argument.hex()  # -0.0 == 0.0
        if type(argument) not in _CONSTANTS:
            raise _UnknownError
        return (type(argument), argument)

    named = {**dict(iterate_arguments(node)), **node.kwargs}
    if not (with_site and named.get("key")):
        named.pop("site", None)
    try:
        return (node.target, *[(name, describe(argument)) for name, argument in named.items()])
    except _UnknownError:
        return None


def describe_tensor(value: Any) -> TensorForm | None:
    """Return the form of a fake value; None for anything but a strided tensor of known extents."""
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        return None
    shape, strides = tuple(value.shape), value.stride()
    known = all(type(number) is int for number in (*shape, *strides)) and not (value.is_conj() or value.is_neg())
    return (shape, strides, value.dtype, value.device) if known else None


def _run_on_fakes(node: Node, mode: FakeTensorMode, call: Call | None, read: Sequence[Any]) -> Any:
    """Return the result of the operator on fake tensors, and keep its form for equal calls."""
    with mode, torch.no_grad():
        value = run_call(node, get_value)
    if call is not None:
        _KNOWN[mode][call] = _describe_results(value, read)
    return value


def _describe_results(value: Any, read: Sequence[Any]) -> _Results | None:
    """Return the results of a call; None if one is no tensor of known form, or if they share memory of their own."""
    results = list(value) if isinstance(value, tuple | list) else [value]
    forms = [form for form in map(describe_tensor, results) if form is not None]
    if not results or len(forms) < len(results):
        return None
    places = {_get_memory(one): place for place, one in enumerate(read) if isinstance(one, torch.Tensor)}
    own = [_get_memory(one) for one in results if _get_memory(one) not in places]
    if len(set(own)) < len(own):
        return None
    known = [
        (form, one.storage_offset(), places.get(_get_memory(one))) for form, one in zip(forms, results, strict=True)
    ]
    return (None if value is results[0] else type(value), known)


def _get_memory(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _make_values(known: _Results, mode: FakeTensorMode, read: Sequence[Any]) -> Any:
    """Return new fake tensors of the known forms."""
    kind, results = known
    values = [_make_fake(result, mode, read) for result in results]
    return values[0] if kind is None else kind(values)


def _make_fake(result: _Result, mode: FakeTensorMode, read: Sequence[Any]) -> FakeTensor:
    form, offset, place = result
    if place is not None:
        return make_fake(mode, read[place].untyped_storage(), form, offset)
    shape, strides, dtype, device = form
    return FakeTensor(mode, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)


def make_memory(size: int) -> torch.UntypedStorage:
    """Return memory of so many bytes for fake tensors, which takes none."""
    return torch.UntypedStorage(size, device="meta")


def make_fake(
    mode: FakeTensorMode,
    memory: torch.UntypedStorage,
    form: TensorForm,
    offset: int,
    constant: torch.Tensor | None = None,
) -> FakeTensor:
    """Return a fake tensor over memory that is there.

    Args:
        mode: of the tensor.
        memory: of at least the bytes that the form needs behind the offset.
        form: extents, strides, type and device.
        offset: the first element in memory.
        constant: the values, if torch knows them.
    """
    shape, strides, dtype, device = form
    value = torch.empty(0, dtype=dtype, device="meta").set_(memory, offset, shape, strides)
    return FakeTensor(mode, value, device, constant=constant)


def _list_values_read(node: Node) -> tuple[Any, ...]:
    return tuple(map(find_value, node.all_input_nodes))
