"""Operators of the CPU that do again what they did in Python, without Python: what repeat.cpp is told of a call.

Python takes 28 µs for a convolution, and a step of ResNet-20 makes 140 such calls.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.runtime.kernels.loader import load_library

logger = logging.getLogger("qcompiler")

LIBRARY: Final = "repeat"
#: operators without lists of tensors among their arguments
NAMES: Final = (
    "multiply_whole",
    "convolve_codes",
    "convolve_input",
    "convolve_gradient",
    "quantize_blocks",
    "quantize_by",
    "quantize_measured",
    "dequantize_blocks",
    "pack_codes",
    "unpack_codes",
)
#: behind the name of an operator: the same operator, always in Python
SUFFIX: Final = "_in_python"
#: type of an argument → as repeat.cpp calls it
_LETTERS: Final = {"Tensor": "t", "Optional[Tensor]": "o", "str": "s", "List[int]": "l", "int": "i", "bool": "i"}
#: as in the C++
_TYPES: Final = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
_MOST_ARGUMENTS: Final = 4
_MOST_BYTES: Final = 2048
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
_Argument: TypeAlias = ctypes.Structure | ctypes.c_void_p | int
_STATE: Final = threading.local()


class _Place(NamedTuple):
    """An address within a structure, or as an argument (offset −1), by the tensor."""

    offset: int
    tensor: int
    shift: int


class Recorder(TorchDispatchMode):
    """Listens to one call of an operator in Python."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = given
        #: kept until the end, so that no two have one address
        self.made: list[Tensor] = []
        self.calls: list[tuple[Any, tuple[_Argument, ...]]] = []
        #: what the operator does besides: it cannot be repeated
        self.others: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator of torch, and note it unless it makes a view."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.made += [result] * result.is_cpu
        elif not func.is_view:
            self.others.append(str(func))
        return result

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The first address of each tensor, and the first behind it."""
        return [_find_span(tensor) for tensor in (*self.given, *self.made)]

    def find_place(self, address: int, offset: int = -1) -> _Place:
        """Return an address by the tensor that holds it.

        Raises:
            LookupError: no tensor holds it, or several do.
        """
        found = [(tensor, address - low) for tensor, (low, high) in enumerate(self.spans) if low <= address < high]
        if len(found) != 1:
            raise LookupError(f"an address that {len(found)} tensors hold")
        return _Place(offset, *found[0])


def _find_span(tensor: Tensor) -> tuple[int, int]:
    start, size = tensor.data_ptr(), tensor.element_size()
    if not tensor.numel():
        return start, start
    last = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def call_kernel(function: Any, *given: _Argument) -> None:
    """Call a function of a library; whoever listens to the operator is told of it."""
    function(*(ctypes.byref(one) if isinstance(one, ctypes.Structure) else one for one in given))
    recorder: Recorder | None = getattr(_STATE, "recorder", None)
    if recorder is not None:
        recorder.calls.append((function, given))


def listen(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator of a name for `SUFFIX`: it tells repeat.cpp what the reference does, if that listens.

    An error crosses the C++ as its text, and becomes a `RuntimeError` there.
    """

    def run(*given: Any) -> Any:
        library = _load()
        assert not isinstance(library, str)
        try:
            return _record(library, name, reference, given) if library.listens() else reference(*given)
        except BaseException as error:  # it may not pass through C++
            library.fail(f"{name}: {type(error).__name__}: {error}".encode())
            return [] if _returns_list(name) else torch.empty(0)

    return run


def _record(library: ctypes.CDLL, name: str, reference: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """Return the results of the reference, and say how they were made."""
    recorder = Recorder([one for one in given if isinstance(one, Tensor)])
    _STATE.recorder = recorder
    try:
        with recorder:
            results = reference(*given)
    finally:
        _STATE.recorder = None
    try:
        _tell(library, recorder, results if isinstance(results, list) else [results])
    except LookupError as reason:
        logger.debug("%s runs in Python every time: %s", name, reason)
    return results


def _tell(library: ctypes.CDLL, recorder: Recorder, results: list[Tensor]) -> None:
    """Say what was recorded; nothing if that cannot be repeated.

    Raises:
        LookupError: it cannot.
    """
    calls = [(function, [_describe(recorder, one) for one in given]) for function, given in recorder.calls]
    returned = [recorder.find_place(result.data_ptr()) for result in results if result.numel()]
    places = [place.tensor - len(recorder.given) for place in returned]
    _check(recorder, results, places, calls)
    for place, made in enumerate(recorder.made):
        tensor = results[places.index(place)] if place in places else made
        _tell_made(library, tensor, *_find_uses(calls, place + len(recorder.given), is_result=place in places))
    for function, arguments in calls:
        library.add_call(ctypes.cast(function, ctypes.c_void_p))
        for value, addresses in arguments:
            _tell_argument(library, value, addresses)
    library.finish(len(places), _list_numbers(places))


#: a number or the bytes of a structure, and the addresses within
_Described: TypeAlias = tuple[int | bytes, list[_Place]]


def _check(
    recorder: Recorder, results: list[Tensor], places: list[int], calls: Sequence[tuple[Any, list[_Described]]]
) -> None:
    """Say that a call cannot be repeated.

    Raises:
        LookupError: it cannot.
    """
    if recorder.others:
        raise LookupError(", ".join(recorder.others))
    if len(set(places)) != len(results) or min(places) < 0:
        raise LookupError("results that are no memory of their own")
    for place, result in zip(places, results, strict=True):
        if _find_span(result) != recorder.spans[len(recorder.given) + place] or result.dtype not in _TYPES:
            raise LookupError("a result that is a part of memory")
    if any(made.dtype not in _TYPES for made in recorder.made):
        raise LookupError("memory of another type")
    for _, arguments in calls:
        size = sum(len(value) + 15 for value, _ in arguments if isinstance(value, bytes))
        if len(arguments) > _MOST_ARGUMENTS or size > _MOST_BYTES:
            raise LookupError("a call of many arguments")


def _describe(recorder: Recorder, argument: _Argument) -> _Described:
    if isinstance(argument, ctypes.Structure):
        found = ((offset, ctypes.c_void_p.from_buffer(argument, offset).value) for offset in _find(type(argument)))
        return bytes(argument), [recorder.find_place(address, offset) for offset, address in found if address]
    if isinstance(argument, ctypes.c_void_p):
        return 0, [recorder.find_place(argument.value)] if argument.value else []
    return int(argument), []


@functools.cache
def _find(kind: type[ctypes.Structure]) -> tuple[int, ...]:
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


def _find_uses(calls: Sequence[tuple[Any, list[_Described]]], tensor: int, *, is_result: bool) -> tuple[int, int]:
    """Return the first and the last call that need memory; −1: a result, −2: none does."""
    uses = [
        index
        for index, (_, arguments) in enumerate(calls)
        if any(place.tensor == tensor for _, places in arguments for place in places)
    ]
    if is_result:
        return -1, -1
    return (uses[0], uses[-1]) if uses else (-2, -2)


def _tell_made(library: ctypes.CDLL, tensor: Tensor, first: int, last: int) -> None:
    size, stride = _list_numbers(tensor.shape), _list_numbers(tensor.stride())
    library.add_made(tensor.ndim, size, stride, _TYPES.index(tensor.dtype), first, last)


def _tell_argument(library: ctypes.CDLL, value: int | bytes, addresses: list[_Place]) -> None:
    if isinstance(value, bytes):
        library.add_structure(value, len(value))
    else:
        library.add_number(value)
    for place in addresses:
        library.add_address(*place)


def _list_numbers(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def start() -> str:
    """Let torch call repeat.cpp for operators on the CPU; return the reason why it does not, or an empty string."""
    library = _load()
    if isinstance(library, str):
        return library
    for name in NAMES:
        if library.add_operator(name.encode(), f"qcompiler::{name}{SUFFIX}".encode(), *_describe_schema(name)):
            return f"torch takes no operator {name} in C++"
    return ""


def _describe_schema(name: str) -> tuple[bytes, bool]:
    arguments = getattr(torch.ops.qcompiler, name).default._schema.arguments
    return "".join(_LETTERS[str(one.type)] for one in arguments).encode(), _returns_list(name)


def _returns_list(name: str) -> bool:
    (result,) = getattr(torch.ops.qcompiler, name).default._schema.returns
    return str(result.type) == "List[Tensor]"


@functools.cache
def _load() -> ctypes.CDLL | str:
    library = load_library(LIBRARY)
    if isinstance(library, str):
        return library
    number, numbers = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    library.add_operator.argtypes = (*(ctypes.c_char_p,) * 3, number)
    library.add_made.argtypes = (number, numbers, numbers, *(number,) * 3)
    library.add_structure.argtypes = (ctypes.c_char_p, number)
    library.add_number.argtypes = (number,)
    library.add_address.argtypes = (number,) * 3
    library.finish.argtypes = (number, numbers)
    library.listens.restype = library.count_recordings.restype = number
    return library


def forget() -> None:
    """Let every operator run in Python again, twice for each kind of arguments."""
    library = _load() if _load.cache_info().currsize else ""  # else nothing was recorded
    if not isinstance(library, str):
        library.forget()


def count_recordings() -> int:
    """Return the number of kinds of calls that are repeated."""
    library = _load()
    return 0 if isinstance(library, str) else int(library.count_recordings())
