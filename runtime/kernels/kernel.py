"""What a kernel is, and what it is told of a product before the product runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from qcompiler.runtime.numbers.formats import Format, Kind

#: (int8 [rows, length], int8 [length, columns]) → the exact sums, int32 [rows, columns]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: (int8 [rows, length], float32 [blocks of rows, runs], rows of a block, the same of the right matrix turned, run)
#: → float32 [rows, columns]: the exact sum of each run, scaled and added in the order of runs
RunProduct: TypeAlias = Callable[[Tensor, Tensor, int, Tensor, Tensor, int, int], Tensor]
#: start, count, step, taps and dilation, for each dimension of space (runtime/patches.py)
Windows: TypeAlias = tuple[Sequence[int], ...]


class Codes(NamedTuple):
    """One operand of a kernel that scales its sums."""

    codes: Tensor
    #: dense: float32, or uint8 for stored exponents
    scale: Tensor
    #: dense: uint8; None: codes of zero are 0
    zero_point: Tensor | None
    #: samples, rows or columns that share a scale
    edge: int
    #: True for a weight whose taps are read in reverse
    is_reversed: bool = False
    #: True for int8 codes that are those of 0 … 255 less 128
    is_shifted: bool = False


#: (both operands, bias, windows, float32 result, is first): write the result of `convolve_codes` or of
#: `convolve_gradient` (runtime/convolutions.py), or add it to the result if it is not the first; then the bias
Convolution: TypeAlias = Callable[[Codes, Codes, Tensor | None, Windows, Tensor, bool], None]
#: (codes [rows, length], codes [length, columns], bias of columns, float32 result): write the result of `matmul_codes`
WholeProduct: TypeAlias = Callable[[Codes, Codes, Tensor | None, Tensor], None]
#: any of them
AnyCall = TypeVar("AnyCall", Product, RunProduct, WholeProduct, Convolution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """A product of codes, [rows, length] × [length, columns]."""

    #: the type of the device: cpu, cuda
    device: str
    #: of the left and of the right codes
    formats: tuple[Format, Format]
    rows: int
    length: int
    columns: int
    #: products that read one element of copied patches; 0: nothing is copied
    reuse: int = 0
    #: the image that is read through windows: left, right, or empty for a product of matrices
    image: str = ""
    #: elements of a sum after which a scale changes; 0: no scale changes within a sum
    run: int = 0
    #: whether several pairs of matrices are multiplied
    is_batch: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel(Generic[AnyCall]):
    """One row of the table."""

    name: str
    device: str
    #: an empty string, or the reason why the kernel cannot compute a product
    explain: Callable[[Facts], str]
    #: an empty string, or the reason why the float kernel is faster
    weigh: Callable[[Facts], str]
    call: AnyCall
    #: the operand that is an image, as in the facts of the products that the kernel computes
    image: str = ""
    #: whether sums are exact that leave 32 bits
    has_wide_sums: bool = False


def explain_sums(facts: Facts) -> str:
    """Say that a sum can leave 32 bits; empty: none can."""
    length = facts.run or facts.length
    largest = length * _find_reach(facts.formats[0]) * _find_reach(facts.formats[1])
    return f"a sum of {length} products can leave 32 bits" if largest >= 2**31 else ""


def _find_reach(form: Format) -> int:
    """Return the largest |code − zero point|, and |code| after the shift into int8."""
    return max(int(form.largest), 128 if is_shifted(form) else 0)


def is_shifted(form: Format) -> bool:
    """Return True for codes of 0 … 255, which are less 128 as int8."""
    return form.kind is not Kind.SIGNED and form.bits == 8


def weigh_products(facts: Facts, least: int, *, by_run: bool = False) -> str:
    """Say that the float kernel is as fast for fewer than `least` products; empty: there are more.

    Args:
        by_run: count the products of one run, since every run is a call of its own.
    """
    run = facts.run if by_run else 0
    products, kind = facts.rows * (run or facts.length) * facts.columns, "products of a run" if run else "products"
    return "" if products >= least else f"float is as fast for {products} {kind}; valid: {least} or more"
