"""Every kernel, and the choice of one."""

from typing import Final

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
    if kernel:
        (found,) = (row for row in KERNELS if row.name == kernel)
        return found.call(a, b)
    # float64 holds every sum that int32 does, on every device
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)
