"""Calls of libraries in C++: scales and zero points of an operand, threads, and memory for packed codes.

What a call says besides addresses follows from shapes, and is found once: Python takes 10 µs for that. A call then is a
copy with addresses written in.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompiler.runtime.kernels.kernel import Layout
from qcompiler.runtime.kernels.repeat import call_kernel

#: of values: what codes.h calls kinds
_FLOATS, _EXPONENTS, _BYTES, _NOTHING = range(4)


class Values(ctypes.Structure):
    """One value for every `edge` rows."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "edge")))


class Prepared(NamedTuple):
    """A function, and what it is told besides addresses."""

    function: Any
    #: a structure
    call: Any
    #: bytes of memory for packed codes
    scratch: int
    #: bytes between the first code of the second operand and that which the kernel starts with
    first: int = 0


def lay_out_scale(side: Layout) -> Values:
    """Return the scales of an operand, without the address."""
    return Values(None, _EXPONENTS if side.scale is torch.uint8 else _FLOATS, side.edge)


def lay_out_point(side: Layout) -> Values:
    """Return the zero points of an operand, without the address."""
    return Values(None, _BYTES, side.edge) if side.has_point else Values(None, _NOTHING, 1)


def prepare_call(library: ctypes.CDLL | str, name: str, call: Any, threads: int, first: int = 0) -> Prepared:
    """Return the function of a name, and a call of it with the number of threads (arguments: `Prepared`).

    Args:
        library: the library, or the reason why this processor has none, which is raised.
    """
    if isinstance(library, str):
        raise RuntimeError(library)
    call.threads = threads
    return Prepared(getattr(library, name), call, library.count_scratch(call), first)


def run_call(prepared: Prepared, call: Any, like: Tensor) -> None:
    """Call the function with memory for packed codes, on the device of `like`, and a copy that has the addresses."""
    memory = like.new_empty(prepared.scratch, dtype=torch.uint8)
    call.scratch = memory.data_ptr()
    call_kernel(prepared.function, call)


def get_pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor; None: there is none."""
    return None if tensor is None else tensor.data_ptr()
