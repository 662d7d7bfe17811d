"""Operators of the CPU that do again what they did in Python, without Python: what repeat.cpp is told of a call.

Python takes 28 µs for a convolution, and a step of ResNet-20 makes 140 such calls.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.loader import load_library
from qcompiler.runtime.kernels.recorder import Described, Recording, record

logger = logging.getLogger("qcompiler")

LIBRARY: Final = "repeat"
#: operators without lists of tensors among their arguments
NAMES: Final = (
    "multiply_whole",
    "multiply_runs",
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
#: behind the name of an operator: the same operator, always in Python, which takes lists of bytes for texts
SUFFIX: Final = "_in_python"
#: type of an argument → as repeat.cpp calls it
_LETTERS: Final = {"Tensor": "t", "Optional[Tensor]": "o", "str": "s", "List[int]": "l", "int": "i", "bool": "i"}
#: as in the C++
_TYPES: Final = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
_MOST_ARGUMENTS: Final = 4
_MOST_BYTES: Final = 2048
#: of the start of a structure
_ALIGNMENT: Final = 16


def listen(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator of a name for `SUFFIX`: it tells repeat.cpp what the reference does, if that listens.

    No error may pass through C++. Ctrl-C lets the reference run again, and is raised when the operator has ended. All
    other errors cross as their text: a `ValueError` stays one, and others become a `RuntimeError`.
    """

    def run(*given: Any) -> Any:
        while True:
            try:
                return _run(name, reference, given)
            except KeyboardInterrupt:
                _call("interrupt_later")
            except BaseException as error:
                text = str(error) if isinstance(error, ValueError) else f"{name}: {type(error).__name__}: {error}"
                _call("fail", text.encode(errors="replace"), isinstance(error, ValueError))
                return [] if _describe_schema(name)[1] else torch.empty(0)

    return run


def _run(name: str, reference: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """Return the results of the reference."""
    letters, _ = _describe_schema(name)  # torch leaves out defaults at the end
    told = [bytes(one).decode() if letter == "s" else one for one, letter in zip(given, letters, strict=False)]
    if not _call("start_recording"):
        return reference(*told)
    return _run_and_tell(name, reference, told)


def _call(name: str, *given: Any) -> Any:
    library = load()
    assert not isinstance(library, str)  # nobody else calls these operators
    return getattr(library, name)(*given)


def _run_and_tell(name: str, reference: Callable[..., Any], given: Sequence[Any]) -> Any:
    results, found = record(lambda: reference(*given), [one for one in given if isinstance(one, Tensor)])
    reason = found if isinstance(found, str) else _explain_limits(found)
    if reason:
        logger.debug("%s runs in Python every time: %s", name, reason)
    elif not isinstance(found, str):
        _tell(found)
    return results


def _explain_limits(recording: Recording) -> str:
    """Say why repeat.cpp cannot hold a recording; empty: it can."""
    if any(made.tensor.dtype not in _TYPES for made in recording.made):
        return "memory of another type"
    for _, told in recording.calls:
        size = sum(len(one.value) + _ALIGNMENT for one in told if isinstance(one.value, bytes))
        if len(told) > _MOST_ARGUMENTS or size > _MOST_BYTES:
            return f"{len(told)} arguments of {size} bytes"
    return ""


def _tell(recording: Recording) -> None:
    for tensor, first, last in recording.made:
        size, stride = _list_numbers(tensor.shape), _list_numbers(tensor.stride())
        _call("add_made", tensor.ndim, size, stride, _TYPES.index(tensor.dtype), first, last)
    for function, told in recording.calls:
        _call("add_call", ctypes.cast(function, ctypes.c_void_p))
        for argument in told:
            _tell_argument(argument)
    _call("finish", len(recording.results), _list_numbers(recording.results))


def _tell_argument(argument: Described) -> None:
    if isinstance(argument.value, bytes):
        _call("add_structure", argument.value, len(argument.value))
    else:
        _call("add_number", argument.value)
    for place in argument.places:
        _call("add_address", *place)


def _list_numbers(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def start() -> str:
    """Let torch call repeat.cpp for operators on the CPU; return the reason why it does not, or an empty string."""
    library = load()
    if isinstance(library, str):
        return library
    for name in NAMES:
        letters, returns_list = _describe_schema(name)
        if library.add_operator(name.encode(), f"qcompiler::{name}{SUFFIX}".encode(), letters.encode(), returns_list):
            logger.warning("%s stays in Python, and is slower: torch takes no operator in C++", name)
            return f"torch takes no operator {name} in C++"
    return ""


def start_when_loaded() -> None:
    """Call `start` if the library is there: in front of a step, as torch may not change an operator that is called."""
    if load.cache_info().currsize:
        start()


@functools.cache
def _describe_schema(name: str) -> tuple[str, bool]:
    """Return a letter for each argument of an operator, and whether it returns a list."""
    schema = getattr(torch.ops.qcompiler, name).default._schema
    (result,) = schema.returns
    return "".join(_LETTERS[str(one.type)] for one in schema.arguments), str(result.type) == "List[Tensor]"


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, or the reason why this machine has none."""
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
    library.fail.argtypes = (ctypes.c_char_p, number)
    library.set_interrupt(ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p))
    library.start_recording.restype = library.count_recordings.restype = number
    return library


def forget() -> None:
    """Let every operator run in Python again, twice for each kind of arguments."""
    library = load() if load.cache_info().currsize else ""  # else nothing was recorded
    if not isinstance(library, str):
        library.forget()


def count_recordings() -> int:
    """Return the number of kinds of calls that are repeated."""
    library = load()
    return 0 if isinstance(library, str) else int(library.count_recordings())
