"""The kernel of the CPU in multiply_whole.cpp: products of matrices whose sums are scaled once."""

import ctypes
import functools
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import Values, get_pointer, point_to_scale, point_to_zero, run_call
from qcompiler.runtime.kernels.kernel import Codes, Facts, Kernel, weigh_products
from qcompiler.runtime.kernels.loader import explain_vectors, has_wide_vectors, load_library

LIBRARY: Final = "multiply_whole"
#: with AVX2, and with AVX-512 VNNI: with AVX2 128·256·256 take 0.28 ms, in float 0.25; twice as many 0.52 and 0.56
LEAST_PRODUCTS: Final = (2**24, 2**19)
#: of rows, and of columns: one row times 4096·4096 codes takes 7 times as long as in float, since all
#: codes are packed; 4 rows times 2048·4096 take half as long
LEAST_LINES: Final = 4
#: 2^31 / 255: int32 holds the sum of the codes of a line
MOST_PRODUCTS: Final = 2**23


class _Side(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("outer", "step", "length_step", "is_signed")),
        *((name, Values) for name in ("scale", "point")),
        ("offset", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Side) for name in ("a", "b")),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("length", "threads")),
        *((name, ctypes.c_void_p) for name in ("scratch", "c")),
    )


def _explain(facts: Facts) -> str:
    """Say why the kernel cannot multiply two matrices; empty: it can."""
    if facts.is_batch or facts.reuse:
        return "the kernel of whole sums takes two matrices that are there, no batch and no patches"
    if facts.length > MOST_PRODUCTS:
        return f"the kernel of whole sums takes {MOST_PRODUCTS} products of a sum at most, got {facts.length}"
    return explain_vectors()


def _weigh(facts: Facts) -> str:
    """Say why the float kernel is faster; empty: it is not."""
    lines = min(facts.rows, facts.columns)
    if lines < LEAST_LINES:
        return f"float is as fast for {lines} rows or columns; valid: {LEAST_LINES} or more"
    return weigh_products(facts, LEAST_PRODUCTS[has_wide_vectors()])


@functools.cache
def _load_kernel() -> ctypes.CDLL | str:
    """Return the library, or the reason why this processor has none."""
    library = explain_vectors() or load_library(LIBRARY)
    if isinstance(library, ctypes.CDLL):
        library.multiply_whole.argtypes = library.count_scratch.argtypes = (ctypes.POINTER(_Call),)
        library.count_scratch.restype = ctypes.c_int64
    return library


def _multiply(a: Codes, b: Codes, bias: Tensor | None, result: Tensor) -> None:
    """Write float32 [rows, columns] of codes [rows, length] and [length, columns], and a dense bias of columns."""
    sides = _point_to_side(a, 0, 1), _point_to_side(b, 1, 0)
    call = _Call(*sides, bias=get_pointer(bias), length=a.codes.shape[1], c=result.data_ptr())
    run_call(_load_kernel(), LIBRARY, call, result)


def _point_to_side(side: Codes, outer: int, length: int) -> _Side:
    """Return an operand by the dimensions of its rows or columns, and of the sum."""
    codes, is_signed = side.codes, side.codes.dtype is torch.int8
    sizes = codes.shape[outer], codes.stride(outer), codes.stride(length), is_signed
    offset = 128 * (is_signed and not side.is_shifted)
    return _Side(codes.data_ptr(), *sizes, point_to_scale(side), point_to_zero(side), offset)


WHOLE: Final = Kernel("whole", "cpu", _explain, _weigh, _multiply, has_wide_sums=True)
