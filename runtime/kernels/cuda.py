"""The kernels of CUDA that multiply codes: torch's own, and ours in Triton."""

from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.kernel import Facts, Kernel
from qcompiler.runtime.kernels.runs import LEAST_RUN, explain_short
from qcompiler.runtime.kernels.triton_support import explain_triton
from qcompiler.runtime.numbers.integers import Kind

#: what torch 2.13 asks of `_int_mm` on CUDA: more rows than that, and multiples along the other axes
_TOO_FEW_ROWS: Final = 16
_MULTIPLE: Final = 8


def _explain_int_mm(facts: Facts) -> str:
    """Say why `_int_mm` cannot compute a product; empty: it can."""
    if facts.rows <= _TOO_FEW_ROWS:
        return f"the integer kernel of CUDA needs more than {_TOO_FEW_ROWS} rows, got {facts.rows}"
    if not facts.length or not facts.columns or facts.length % _MULTIPLE or facts.columns % _MULTIPLE:
        shape = f"[{facts.length}, {facts.columns}]"
        return f"the integer kernel of CUDA needs a right matrix of multiples of {_MULTIPLE}, got {shape}"
    return ""


def _explain_runs(facts: Facts) -> str:
    """Say why the kernel in Triton cannot compute a product; empty: it can."""
    if facts.run < LEAST_RUN:
        return explain_short(facts.run)
    for form in facts.formats:
        if form.kind is not Kind.SIGNED:
            return f"the kernel of sums with several scales takes signed integers, got {form}"
    return explain_triton()


def _weigh(facts: Facts) -> str:
    """Say why the float kernel is preferred: no measurement says that integers are faster."""
    return 'integers were not timed on CUDA; valid: execution="integer"'


def _sum_runs(a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int) -> Tensor:
    """Return the sums run by run (arguments: `multiply_runs`)."""
    from qcompiler.runtime.kernels.triton_runs import sum_runs  # needs Triton

    return sum_runs(a, a_factors, a_edge, b, b_factors, b_edge, run)


INT_MM: Final = Kernel("int-mm-cuda", "cuda", _explain_int_mm, _weigh, torch.ops.aten._int_mm.default)
RUNS: Final = Kernel("triton-runs", "cuda", _explain_runs, _weigh, _sum_runs)
