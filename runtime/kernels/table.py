"""Every kernel, and the choice of one."""

from typing import Final, cast

import torch
from torch import Tensor

from qcompiler.runtime.kernels import cpu
from qcompiler.runtime.kernels.kernel import Facts, Kernel

KERNELS: Final[tuple[Kernel, ...]] = (cpu.INT_MM,)


def find_kernel(facts: Facts, *, faster: bool) -> Kernel | str:
    """Return the first kernel that computes a product, or the reason why none does.

    Args:
        faster: only a kernel that is faster than the float kernel.
    """
    reasons = []
    for kernel in KERNELS:
        if kernel.device == facts.device:
            reason = kernel.explain(facts) or (kernel.weigh(facts) if faster else "")
            if not reason:
                return kernel
            reasons.append(reason)
    return "; ".join(reasons) or f"there is no integer kernel for {facts.device}"


def multiply(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return the sums of products of int8 codes as int32, by the kernel of a name, or by the reference (empty)."""
    if kernel and a.ndim > 2:
        return cast(Tensor, torch.ops.qcompiler.multiply_batch.default(a, b, kernel))
    if kernel:
        return _get_kernel(kernel).call(a, b)
    # float64 holds every sum that int32 does, on every device
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)


def multiply_batch(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return the sums of products of matrix after matrix: one call in compiled code, whatever the batch."""
    call, sums = _get_kernel(kernel).call, fake_multiply_batch(a, b, kernel)
    for left, right, result in zip(a, b, sums, strict=True):
        result.copy_(call(left, right))
    return sums


def fake_multiply_batch(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Return an empty result."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int32)


def _get_kernel(name: str) -> Kernel:
    (found,) = (row for row in KERNELS if row.name == name)
    return found
