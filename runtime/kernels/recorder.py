"""What an operator asks of memory and of kernels, recorded while it runs in Python."""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Final = torch.ops.aten
#: operators that ask for memory
_ALLOCATING: Final = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
#: what a function of a library takes: structures, addresses, numbers
Argument: TypeAlias = ctypes.Structure | ctypes.c_void_p | int
#: of memory: the first and the last call that use it
_RESULT, _UNUSED = (-1, -1), (-2, -2)
_STATE: Final = threading.local()


class Place(NamedTuple):
    """An address."""

    #: within a structure; −1: the address is an argument
    offset: int
    #: one of the tensors that the operator got, or behind those one that it made
    tensor: int
    #: bytes from the first element of the tensor
    shift: int


class Described(NamedTuple):
    """An argument of a function."""

    #: a number, or the bytes of a structure
    value: int | bytes
    places: list[Place]


class Made(NamedTuple):
    """Memory that the operator asks for."""

    tensor: Tensor
    first: int
    last: int


class Recording(NamedTuple):
    """All that an operator does."""

    made: list[Made]
    #: functions, and what they are called with
    calls: list[tuple[Any, list[Described]]]
    #: places in `made`
    results: list[int]


def call_kernel(function: Any, *given: Argument) -> None:
    """Call a function of a library; whoever records the operator is told of it."""
    function(*(ctypes.byref(one) if isinstance(one, ctypes.Structure) else one for one in given))
    recorder: _Recorder | None = getattr(_STATE, "recorder", None)
    if recorder is not None:
        recorder.calls.append((function, given))


def record(run: Callable[[], Any], given: Sequence[Tensor]) -> tuple[Any, Recording | str]:
    """Return what `run` returns, and how, or the reason why that cannot be repeated.

    Args:
        run: an operator, whose results are a tensor or a list of tensors.
        given: its arguments that are tensors.
    """
    recorder, outer = _Recorder(), getattr(_STATE, "recorder", None)
    _STATE.recorder = recorder
    try:
        with recorder:
            results = run()
    finally:
        _STATE.recorder = outer
    try:
        return results, _describe(recorder, given, results if isinstance(results, list) else [results])
    except LookupError as reason:
        return results, str(reason)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        #: kept until the end, so that no two have one address
        self.made: list[Tensor] = []
        self.calls: list[tuple[Any, tuple[Argument, ...]]] = []
        #: what torch computes besides
        self.others: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator of torch, and note it unless it makes a view."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.made += [result] * result.is_cpu  # one on the meta device has no memory
        elif not func.is_view:
            self.others.append(str(func))
        return result


def _describe(recorder: _Recorder, given: Sequence[Tensor], results: list[Tensor]) -> Recording:
    """Return what was recorded, with tensors in place of addresses.

    Raises:
        LookupError: that is not all.
    """
    if recorder.others:
        raise LookupError(f"torch computes {', '.join(dict.fromkeys(recorder.others))}")
    spans = [_find_span(tensor) for tensor in (*given, *recorder.made)]
    calls = [(function, [_describe_argument(one, spans) for one in told]) for function, told in recorder.calls]
    places = [_find_result(result, spans, len(given)) for result in results]
    if len(set(places)) < len(places):
        raise LookupError("two results are one memory")
    made = [
        Made(results[places.index(place)], *_RESULT) if place in places else Made(tensor, *_find_uses(calls, index))
        for place, tensor in enumerate(recorder.made)
        for index in [place + len(given)]
    ]
    return Recording(made, calls, places)


def _find_span(tensor: Tensor) -> tuple[int, int]:
    """Return the first address, and the first behind the tensor."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if not tensor.numel():
        return start, start
    last = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _find_place(address: int, spans: Sequence[tuple[int, int]], offset: int = -1) -> Place:
    found = [(tensor, address - low) for tensor, (low, high) in enumerate(spans) if low <= address < high]
    if len(found) != 1:
        raise LookupError(f"{len(found)} tensors hold one address")
    return Place(offset, *found[0])


def _find_result(result: Tensor, spans: Sequence[tuple[int, int]], given: int) -> int:
    """Return the place of a result among all memory that was asked for."""
    _, place, _ = _find_place(result.data_ptr(), spans)
    if place < given or spans[place] != _find_span(result):
        raise LookupError("a result is no memory of its own")
    return place - given


def _describe_argument(argument: Argument, spans: Sequence[tuple[int, int]]) -> Described:
    if isinstance(argument, ctypes.Structure):
        found = (
            (offset, ctypes.c_void_p.from_buffer(argument, offset).value) for offset in _list_offsets(type(argument))
        )
        return Described(bytes(argument), [_find_place(address, spans, offset) for offset, address in found if address])
    if isinstance(argument, ctypes.c_void_p):
        return Described(0, [_find_place(argument.value, spans)] if argument.value else [])
    return Described(int(argument), [])


@functools.cache
def _list_offsets(kind: type[ctypes.Structure]) -> tuple[int, ...]:
    """Return where a structure holds addresses."""
    return tuple(_walk(kind, 0))


def _walk(kind: Any, offset: int) -> Iterator[int]:
    if kind is ctypes.c_void_p:
        yield offset
    elif issubclass(kind, ctypes.Array):
        for place in range(kind._length_):
            yield from _walk(kind._type_, offset + place * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, inner, *_ in kind._fields_:
            yield from _walk(inner, offset + getattr(kind, name).offset)


def _find_uses(calls: Sequence[tuple[Any, list[Described]]], tensor: int) -> tuple[int, int]:
    """Return the first and the last call that use a tensor."""
    uses = [
        index
        for index, (_, told) in enumerate(calls)
        if any(place.tensor == tensor for one in told for place in one.places)
    ]
    return (uses[0], uses[-1]) if uses else _UNUSED
