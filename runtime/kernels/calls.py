"""Calls of libraries in C++: scales and zero points of an operand, threads, and memory for packed codes."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qcompiler.runtime.kernels.kernel import Codes
from qcompiler.runtime.kernels.recorder import call_kernel

#: of values: what codes.h calls kinds
_FLOATS, _EXPONENTS, _BYTES, _NOTHING = range(4)


class Values(ctypes.Structure):
    """One value for every `edge` rows."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "edge")))


def point_to_scale(side: Codes) -> Values:
    """Return the scales of an operand."""
    kind = _EXPONENTS if side.scale.dtype is torch.uint8 else _FLOATS
    return Values(side.scale.data_ptr(), kind, side.edge)


def point_to_zero(side: Codes) -> Values:
    """Return the zero points of an operand."""
    if side.zero_point is None:
        return Values(None, _NOTHING, 1)
    return Values(side.zero_point.data_ptr(), _BYTES, side.edge)


def run_call(library: ctypes.CDLL | str, name: str, call: Any, like: Tensor) -> None:
    """Call the function of a name with a structure, and with memory for packed codes, on the device of `like`.

    Args:
        library: the library, or the reason why this processor has none, which is raised.
    """
    if isinstance(library, str):
        raise RuntimeError(library)
    call.threads = torch.get_num_threads()
    memory = like.new_empty(library.count_scratch(call), dtype=torch.uint8)
    call.scratch = memory.data_ptr()
    call_kernel(getattr(library, name), call)


def get_pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor; None: there is none."""
    return None if tensor is None else tensor.data_ptr()
