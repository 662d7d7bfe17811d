"""Every kernel of a quantizer, and the reason why a quantizer has none."""

import dataclasses
import math
from collections.abc import Callable
from typing import Final

import torch

from qcompiler.runtime.kernels import quantize_blocks, quantize_whole
from qcompiler.runtime.kernels.loader import explain_compiler, has_wide_vectors
from qcompiler.runtime.kernels.triton_support import MOST_ELEMENTS, MOST_IN_PROGRAM, explain_triton
from qcompiler.runtime.numbers.blocks import TENSOR, view_blocks
from qcompiler.runtime.numbers.formats import IntFormat, Kind
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import QuantSpec, Scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerFacts:
    """A quantizer, or the part of one that turns codes into floats."""

    #: the type of the device: cpu, cuda
    device: str
    #: of the floats
    dtype: torch.dtype
    spec: QuantSpec
    layout: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QuantizerKernel:
    """One row of the table."""

    name: str
    device: str
    #: an empty string, or the reason why the kernel cannot compute a quantizer
    explain: Callable[[QuantizerFacts], str]
    #: an empty string, or the reason why a compiled loop is as fast
    weigh: Callable[[QuantizerFacts], str]


def explain_quantizer(kernels: tuple[QuantizerKernel, ...], facts: QuantizerFacts) -> str:
    """Return the reason why the kernel of the device does not compute a quantizer; empty: it does."""
    for kernel in kernels:
        if kernel.device == facts.device:
            return kernel.explain(facts) or kernel.weigh(facts)
    return f"no kernel of a quantizer runs on {facts.device}"


def explain_format(spec: QuantSpec) -> str:
    """Say why no kernel writes the codes of a spec, or reads them; empty: kernels do."""
    form = spec.format
    is_short = isinstance(form, IntFormat) and form.bits <= 8
    return "" if is_short else f"kernels write integers of at most 8 bits, got {form}"


def _explain_numbers(facts: QuantizerFacts) -> str:
    if reason := explain_format(facts.spec):
        return reason
    dtypes = quantize_blocks.DTYPES[facts.device]
    if facts.dtype in dtypes:
        return ""
    *valid, given = (str(one).removeprefix("torch.") for one in (*dtypes, facts.dtype))
    return f"kernels read {' and '.join(valid)}, got {given}"


def explain_range(spec: QuantSpec) -> str:
    """Say why no kernel finds the scales of a spec; empty: kernels do."""
    if spec.range != Current():
        return f"the range {spec.range} is not that of the present block"
    if spec.format.kind is not Kind.SIGNED or spec.scale is Scale.TWO_LEVEL:
        return f"kernels find the scales of signed integers, got {spec.format} and {spec.scale}"
    return ""


def _explain_order(facts: QuantizerFacts) -> str:
    return quantize_blocks.explain_order(_describe(facts))


def _describe(facts: QuantizerFacts) -> quantize_blocks.Call:
    return quantize_blocks.find_call(facts.shape, facts.stride, str(facts.spec), facts.layout)


def _count_elements(facts: QuantizerFacts) -> int:
    """Return the elements of a block."""
    return math.prod(view_blocks(facts.shape, facts.layout, facts.spec.block).edges)


def _explain_cpu(facts: QuantizerFacts) -> str:
    return _explain_numbers(facts) or explain_compiler()


def _explain_cpu_blocks(facts: QuantizerFacts) -> str:
    return explain_range(facts.spec) or _explain_cpu(facts) or _explain_order(facts) or _explain_size(facts)


def _explain_size(facts: QuantizerFacts) -> str:
    size, most = _count_elements(facts), quantize_whole.MOST_IN_CACHE
    if size <= most or quantize_whole.finds_scales(_describe(facts)):
        return ""
    return f"a block of {size} elements does not stay in the cache; valid: {most}, or blocks one after another"


def _explain_cuda(facts: QuantizerFacts) -> str:
    if math.prod(facts.shape) > MOST_ELEMENTS:
        return f"kernels count elements in 32 bits, got {math.prod(facts.shape)}"
    return _explain_numbers(facts) or explain_triton()


def _explain_cuda_blocks(facts: QuantizerFacts) -> str:
    size = _count_elements(facts)
    if size > MOST_IN_PROGRAM:
        reason = f"a block of {size} elements does not fit into one program; valid: {MOST_IN_PROGRAM}"
        return explain_range(facts.spec) or reason
    return explain_range(facts.spec) or _explain_cuda(facts) or _explain_order(facts)


def _explain_measured(facts: QuantizerFacts) -> str:
    if facts.spec.block != TENSOR:
        return f"the kernel that measures takes one block for the tensor, got {facts.spec.block}"
    return _explain_cpu(facts)


def _weigh_known(facts: QuantizerFacts) -> str:
    """Say why a compiled loop is as fast; empty: it is not."""
    nearest = facts.spec.rounding is Rounding.NEAREST
    return "a compiled loop rounds to nearest by a known scale as fast" if nearest else ""


def _weigh_floats(facts: QuantizerFacts) -> str:
    """Say why a compiled loop is as fast; empty: it is not.

    A loop multiplies by one scale while it reads the codes, a byte in place of four, and is often part of the loop that
    reads the floats. A scale of each block it looks up by two divisions an element.
    """
    return "a compiled loop multiplies by one scale as fast" if facts.spec.block == TENSOR else ""


def has_quick_loops() -> bool:
    """Return True if a loop of the compiler turns codes of a known scale into floats as fast as a kernel writes them.

    With AVX2 a loop of Inductor takes 8 codes at a time, and loads and converts them for longer than floats: where
    kernels write the floats, a step of ResNet-20 with `in-hindsight-w8a8g8` takes 0.84 times as long.
    """
    return has_wide_vectors()


def _weigh_cuda(facts: QuantizerFacts) -> str:
    """Say why a loop is preferred: no measurement says that the kernel is faster (benchmarks/gpu.py makes one)."""
    return "kernels of quantizers were not timed on CUDA"


def _always(facts: QuantizerFacts) -> str:
    return ""


#: scale, codes and floats at once
BLOCKS: Final = (
    QuantizerKernel("blocks", "cpu", _explain_cpu_blocks, _always),
    QuantizerKernel("triton-blocks", "cuda", _explain_cuda_blocks, _weigh_cuda),
)
#: codes and floats by a scale that is known
KNOWN: Final = (
    QuantizerKernel("known", "cpu", _explain_cpu, _weigh_known),
    QuantizerKernel("triton-known", "cuda", _explain_cuda, _weigh_cuda),
)
#: codes and floats by one scale that is known, and what the range learns: a compiler makes loops of its own for that
MEASURED: Final = (QuantizerKernel("measured", "cpu", _explain_measured, _always),)
#: floats of codes; on CUDA the compiler writes this into the loop that reads them
FLOATS: Final = (QuantizerKernel("floats", "cpu", _explain_cpu, _weigh_floats),)
