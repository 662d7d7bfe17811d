"""Whether Triton is there, and how all of our kernels in Triton are compiled."""

import functools
import importlib.util
from typing import Final

#: a·b + c stays two roundings, as in the references: neither LLVM nor ptxas joins them into one `fma`
EXACT: Final = {"enable_fp_fusion": False}
#: elements of a block that the registers of one program hold
MOST_IN_PROGRAM: Final = 4096
#: offsets in memory are int32
MOST_ELEMENTS: Final = 2**31 - 2**16


@functools.cache
def explain_triton() -> str:
    """Return the reason why no kernel in Triton can run; empty: Triton is installed, as every CUDA build brings it."""
    return "" if importlib.util.find_spec("triton") else "Triton is not installed; valid: pip install triton"
