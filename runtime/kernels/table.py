"""Every kernel, and the choice of one."""

from collections.abc import Sequence
from typing import Final, TypeAlias, cast

import torch
from torch import Tensor

from qcompiler.runtime.kernels import convolutions, cpu, cuda, runs, whole
from qcompiler.runtime.kernels.kernel import (
    AnyCall,
    Convolution,
    Facts,
    Kernel,
    Product,
    RunProduct,
    WholeProduct,
    explain_sums,
)
from qcompiler.runtime.kernels.loader import explain_compiler, explain_vectors, has_tiles, has_wide_vectors
from qcompiler.runtime.kernels.triton_support import explain_triton
from qcompiler.runtime.numbers.formats import Kind

#: whole sums, which are scaled once
KERNELS: Final[tuple[Kernel[Product], ...]] = (cpu.INT_MM, cuda.INT_MM)
#: sums of runs, each of which has a scale of its own
RUN_KERNELS: Final[tuple[Kernel[RunProduct], ...]] = (runs.RUNS, cuda.RUNS)
#: whole sums that the kernel scales too, zero points included: before `KERNELS`, but with AMX
WHOLE_KERNELS: Final[tuple[Kernel[WholeProduct], ...]] = (whole.WHOLE,)
#: sums of what windows of an image hold, without a copy of that; sums of runs are scaled and added run by run
CONVOLUTIONS: Final[tuple[Kernel[Convolution], ...]] = (convolutions.CONVOLVE, convolutions.CONVOLVE_GRADIENT)
#: any of them
AnyKernel: TypeAlias = Kernel[Product] | Kernel[RunProduct] | Kernel[WholeProduct] | Kernel[Convolution]


def find_kernel(facts: Facts, *, faster: bool) -> AnyKernel | str:
    """Return the first kernel that computes a product, or the reason why none does.

    Args:
        faster: only a kernel that is faster than the float kernel.
    """
    found = _find_whole(facts, faster=faster) if facts.device == "cpu" and not (facts.run or facts.image) else ""
    return found or _choose(_list_kernels(facts, faster=faster), facts, faster=faster)


def _choose(kernels: Sequence[AnyKernel], facts: Facts, *, faster: bool) -> AnyKernel | str:
    reasons = []
    for kernel in kernels:
        if (kernel.device, kernel.image) == (facts.device, facts.image):
            sums = "" if kernel.has_wide_sums else explain_sums(facts)
            reason = sums or kernel.explain(facts) or (kernel.weigh(facts) if faster else "")
            if not reason:
                return kernel
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or f"there is no integer kernel for {facts.device}"


def _find_whole(facts: Facts, *, faster: bool) -> AnyKernel | str:
    """Return a kernel of `WHOLE_KERNELS`, or why it is slower than float, or not compiled; empty: `_int_mm` is asked.

    `_int_mm` has no fast kernel on some processors. Where it has one, loops around it scale the sums, and add what zero
    points and codes of 0 … 255 need: ViT-Tiny with `tensor-int8` took 1.07 times as long, GPT-2 0.99 times.
    """
    has_points = any(form.kind is not Kind.SIGNED for form in facts.formats)
    found = _choose(WHOLE_KERNELS, facts, faster=True) if has_points or not has_tiles() else ""
    if not isinstance(found, str):
        return found
    if cpu.is_fast() or not faster:
        return ""
    able = _choose(WHOLE_KERNELS, facts, faster=False)
    return explain_compiler() if isinstance(able, str) else able.weigh(facts)


def _list_kernels(facts: Facts, *, faster: bool) -> tuple[AnyKernel, ...]:
    if facts.image or facts.run:
        return CONVOLUTIONS if facts.image else RUN_KERNELS
    return KERNELS if faster else (*KERNELS, *WHOLE_KERNELS)  # one row has no other kernel


def get_convolution(name: str) -> Convolution:
    """Return the kernel of a name that convolves codes."""
    return _get(CONVOLUTIONS, name)


def get_whole(name: str) -> WholeProduct:
    """Return the kernel of a name that scales whole sums."""
    return _get(WHOLE_KERNELS, name)


def multiply(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return the sums of products of int8 codes, int32 by the kernel of a name, int64 by the reference (empty)."""
    if kernel and a.ndim > 2:
        return cast(Tensor, torch.ops.qcompiler.multiply_batch.default(a, b, kernel))
    if kernel:
        return _get(KERNELS, kernel)(a, b)
    # float64 holds sums of 53 bits, on every device
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int64)


def multiply_batch(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return the sums of products of matrix after matrix: one call in compiled code, whatever the batch."""
    call, sums = _get(KERNELS, kernel), fake_multiply_batch(a, b, kernel)
    for left, right, result in zip(a, b, sums, strict=True):
        result.copy_(call(left, right))
    return sums


def fake_multiply_batch(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return an empty result."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int32)


def multiply_runs(
    a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int, kernel: str
) -> Tensor:
    """Return float32 sums of products of int8 codes whose factors change after every `run` elements of a sum.

    Σ over runs in ascending order, from 0: float32(exact sum of the run) · (a's factor · b's factor). Every product and
    every sum is rounded by itself.

    Args:
        a: codes [rows, length].
        a_factors: float32 [blocks of rows, runs].
        a_edge: rows of a block.
        b: codes [length, columns].
        b_factors: float32 [blocks of columns, runs].
        b_edge: columns of a block.
        run: elements of a run; the last run may be shorter.
        kernel: a name of `RUN_KERNELS`; empty: the reference.
    """
    if kernel:
        return _get(RUN_KERNELS, kernel)(a, a_factors, a_edge, b, b_factors, b_edge, run)
    return runs.sum_runs(a, a_factors, a_edge, b, b_factors, b_edge, run)


def fake_multiply_runs(
    a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int, kernel: str
) -> Tensor:
    """Return an empty result."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _get(kernels: Sequence[Kernel[AnyCall]], name: str) -> AnyCall:
    """Return the kernel of a name.

    Raises:
        ValueError: there is none.
    """
    found = {row.name: row.call for row in kernels}
    if name not in found:
        raise ValueError(f"kernel: got {name!r}; valid: {', '.join(found)}")
    return found[name]


def describe_machine() -> str:
    """Return all that kernels of this machine decide, as text: a graph that was lowered elsewhere may not run here."""
    answers = (explain_compiler(), explain_vectors(), has_wide_vectors(), has_tiles(), explain_triton(), cpu.is_fast())
    return " ".join(map(str, (*answers, cpu.sums_are_exact())))
