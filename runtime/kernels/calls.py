"""Calls of libraries in C++: scales and zero points of an operand, threads, and memory for packed codes."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qcompiler.runtime.kernels.kernel import Codes

#: of values: what codes.h calls kinds
_FLOATS, _EXPONENTS, _BYTES, _NOTHING = range(4)


class Values(ctypes.Structure):
    """One value for every `edge` rows."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "edge")))


def describe_scale(side: Codes) -> Values:
    """Return the scales of an operand."""
    kind = _EXPONENTS if side.scale.dtype is torch.uint8 else _FLOATS
    return Values(side.scale.data_ptr(), kind, side.edge)


def describe_point(side: Codes) -> Values:
    """Return the zero points of an operand."""
    if side.zero_point is None:
        return Values(None, _NOTHING, 1)
    return Values(side.zero_point.data_ptr(), _BYTES, side.edge)


def run_library(library: ctypes.CDLL | str, name: str, call: Any, output: str, result: Tensor) -> None:
    """Call the function of a name, with threads, memory for packed codes, and the place of the result.

    Args:
        library: the library, or the reason why this processor has none, which is raised.
        call: what the function is told: a structure with `threads` and `scratch`.
        output: the field of the result.
    """
    if isinstance(library, str):
        raise RuntimeError(library)
    call.threads = torch.get_num_threads()
    setattr(call, output, result.data_ptr())
    scratch = result.new_empty(library.count_scratch(call), dtype=torch.uint8)
    call.scratch = scratch.data_ptr()
    getattr(library, name)(call)
