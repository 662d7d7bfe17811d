"""Sums of products whose scales change on the way: the reference, and the kernel of the CPU in multiply_runs.cpp."""

import ctypes
import functools
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import run_call
from qcompiler.runtime.kernels.kernel import Facts, Kernel, weigh_products
from qcompiler.runtime.kernels.loader import explain_vectors, has_wide_vectors, load_library
from qcompiler.runtime.numbers.blocks import BlockView
from qcompiler.runtime.numbers.integers import Kind

LIBRARY: Final = "multiply_runs"
#: scaling takes a third of the time with runs of 32, and longer than the products with runs of 8
LEAST_RUN: Final = 32
#: with AVX2, and with AVX-512 VNNI: 64·128·64 take 11 µs in float, and 12 µs here, of which the call takes 9. With AVX2
#: 128·256·256 take 0.36 ms, in float 0.46
LEAST_PRODUCTS: Final = (2**23, 2**19)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("lines", "step", "length_step")),
        ("factors", ctypes.c_void_p),
        ("edge", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("length", "run", "threads")),
        *((name, ctypes.c_void_p) for name in ("scratch", "c")),
    )


def sum_runs(a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int) -> Tensor:
    """Return the sums run by run: the reference of every kernel, on every device (arguments: `multiply_runs`)."""
    rows, columns = a.shape[0], b.shape[1]
    of_rows, of_columns = _spread(a_factors, rows, a_edge), _spread(b_factors, columns, b_edge)
    sums = a.new_zeros((rows, columns), dtype=torch.float32)
    for index, first in enumerate(range(0, a.shape[1], run)):
        exact = a[:, first : first + run].to(torch.float64) @ b[first : first + run].to(torch.float64)
        sums = sums + exact.to(torch.float32) * (of_rows[:, index : index + 1] * of_columns[:, index])
    return sums


def _spread(factors: Tensor, extent: int, edge: int) -> Tensor:
    """Return the factors of each row: [blocks, runs] → [extent, runs]."""
    shape = (extent, factors.shape[1])
    return BlockView(shape, shape, (edge, 1)).spread(factors)


def explain_short(run: int) -> str:
    """Say that runs are too short for every kernel of runs."""
    valid = f"{LEAST_RUN} or more, as in hyperblock-int8-wide"
    return f"a scale changes after every {run} elements of a sum; valid: {valid}"


def _explain_runs(facts: Facts) -> str:
    """Say why the kernel cannot compute a product; empty: it can."""
    if facts.run < LEAST_RUN:
        return explain_short(facts.run)
    for form in facts.formats:
        if form.kind is not Kind.SIGNED:
            return f"the kernel of sums with several scales takes signed integers, got {form}"
    return explain_vectors()


def _weigh_runs(facts: Facts) -> str:
    """Say why the float kernel is faster; empty: it is not."""
    return weigh_products(facts, LEAST_PRODUCTS[has_wide_vectors()])


@functools.cache
def _load_kernel() -> ctypes.CDLL | str:
    """Return the library, or the reason why this processor has none."""
    library = explain_vectors() or load_library(LIBRARY)
    if isinstance(library, ctypes.CDLL):
        library.multiply_runs.argtypes = library.count_scratch.argtypes = (ctypes.POINTER(_Call),)
        library.count_scratch.restype = ctypes.c_int64
    return library


def _call_kernel(
    a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int
) -> Tensor:
    """Return the sums run by run (arguments: `multiply_runs`)."""
    (rows, length), columns = a.shape, b.shape[1]
    if not rows * length * columns:
        return a.new_zeros((rows, columns), dtype=torch.float32)
    result = a.new_empty((rows, columns), dtype=torch.float32)
    a_factors, b_factors = a_factors.contiguous(), b_factors.contiguous()
    left = _Matrix(a.data_ptr(), rows, *a.stride(), a_factors.data_ptr(), a_edge)
    right = _Matrix(b.data_ptr(), columns, *reversed(b.stride()), b_factors.data_ptr(), b_edge)
    run_call(_load_kernel(), LIBRARY, _Call(left, right, length, run, c=result.data_ptr()), result)
    return result


RUNS: Final = Kernel("runs", "cpu", _explain_runs, _weigh_runs, _call_kernel)
