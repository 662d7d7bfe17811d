"""The kernels of the CPU."""

import functools
import timeit
from collections.abc import Callable
from typing import Final

import torch

from qcompiler.runtime.kernels.kernel import Facts, Kernel, weigh_products
from qcompiler.runtime.kernels.loader import has_wide_vectors
from qcompiler.runtime.numbers.formats import Kind

#: 32·64·64: a layer of this size takes as long in float, with zero points (benchmarks/integer.py; AMD EPYC with VNNI)
LEAST_PRODUCTS: Final = 2**17
#: copying one element of patches takes about as long as 20 products in float (3×3, one thread)
LEAST_REUSE: Final = 32
#: with a zero point the sum of every row of patches is made too: ResNet-20, of 16 to 64 channels, took 1.38 times as
#: long as in float32, and 1.15 times with the codes turned back into floats (benchmarks/steps.py)
LEAST_REUSE_OF_POINTS: Final = 128
#: seconds of a kernel for 128·128·128 products: 5 products a nanosecond
LONGEST: Final = 4e-4


def _explain_int_mm(facts: Facts) -> str:
    """Say why `_int_mm` cannot compute a product; empty: it can.

    Of a matrix with one row, or one element a row, that another view has turned, torch 2.13 takes the strides (1, 1)
    for those of a dense matrix and returns wrong sums.
    """
    if min(facts.rows, facts.length, facts.columns) < 2:
        shape = f"[{facts.rows}, {facts.length}] × [{facts.length}, {facts.columns}]"
        return f"the integer kernel of the CPU needs two elements along every axis, got {shape}"
    return "" if sums_are_exact() else "the integer kernel of this processor saturates within a sum"


def _weigh_int_mm(facts: Facts) -> str:
    """Say why the float kernel is faster; empty: it is not."""
    if not is_fast():
        return "float is faster on this processor: torch multiplies codes one by one without AVX-512 VNNI"
    has_point = any(form.kind is Kind.AFFINE for form in facts.formats)
    least = LEAST_REUSE_OF_POINTS if has_point else LEAST_REUSE
    if 0 < facts.reuse < least:
        return f"float is as fast for patches that {facts.reuse} products read; valid: {least} or more"
    return weigh_products(facts, LEAST_PRODUCTS)


@functools.cache
def sums_are_exact() -> bool:
    """Return False on a processor that adds pairs of products in 16 bits, as those without VNNI do."""
    low, high = (torch.full((64, 64), code, dtype=torch.int8) for code in (-128, 127))
    products = ((low, low, 16384), (low, high, -16256), (high, low, -16256), (high, high, 16129))
    return all(bool((torch.ops.aten._int_mm(a, b) == 64 * product).all()) for a, b, product in products)


@functools.cache
def is_fast() -> bool:
    """Return False on a processor for which torch has no integer kernel, and runs plain loops instead.

    Measured once, in about 20 ms, as no list of processors stays complete: on an AMD EPYC 7003 loops took 1.5 ms for
    128·128·128 products, 22 times as long as floats, and 25 to 100 times as long for more. On a busy machine the
    threads of either wait for each other, so a ratio alone says nothing: 8 ms for codes and 14 for floats. So what is
    slow is asked for AVX-512 VNNI, with which torch has a kernel; on a new machine the answer takes seconds.
    """
    codes = torch.ones(128, 128, dtype=torch.int8)
    floats = codes.float()
    taken = _measure(lambda: torch.ops.aten._int_mm(codes, codes))
    is_short = taken < LONGEST and taken < 4 * _measure(lambda: floats @ floats)
    return is_short or has_wide_vectors()


def _measure(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of 6 runs."""
    return min(timeit.repeat(run, number=1, repeat=6))


INT_MM: Final = Kernel("int-mm", "cpu", _explain_int_mm, _weigh_int_mm, torch.ops.aten._int_mm.default)
