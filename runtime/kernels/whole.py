"""The kernel of the CPU in multiply_whole.cpp: products of matrices whose sums are scaled once."""

import ctypes
import functools
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import (
    Prepared,
    Values,
    get_pointer,
    lay_out_point,
    lay_out_scale,
    prepare_call,
    run_call,
)
from qcompiler.runtime.kernels.kernel import Codes, Facts, Kernel, Layout, weigh_products
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
    prepared = _prepare(a.lay_out(), b.lay_out(), torch.get_num_threads())
    call = _Call.from_buffer_copy(prepared.call)
    for side, given in ((call.a, a), (call.b, b)):
        side.codes, side.scale.data, side.point.data = given.get_addresses()
    call.bias, call.c = get_pointer(bias), result.data_ptr()
    run_call(prepared, call, result)


@functools.lru_cache(maxsize=4096)
def _prepare(a: Layout, b: Layout, threads: int) -> Prepared:
    """Return a call without addresses."""
    call = _Call(a=_lay_out(a, 0, 1), b=_lay_out(b, 1, 0), length=a.shape[1])
    return prepare_call(_load_kernel(), LIBRARY, call, threads)


def _lay_out(side: Layout, outer: int, length: int) -> _Side:
    """Return an operand by the dimensions of its rows or columns, and of the sum."""
    is_signed = side.dtype is torch.int8
    sizes = side.shape[outer], side.stride[outer], side.stride[length], is_signed
    return _Side(None, *sizes, lay_out_scale(side), lay_out_point(side), 128 * (is_signed and not side.is_shifted))


WHOLE: Final = Kernel("whole", "cpu", _explain, _weigh, _multiply, has_wide_sums=True)
