"""What a kernel is, and what it is told of a product before the product runs."""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor

from qcompiler.runtime.numbers.formats import Format

#: (int8 [rows, length], int8 [length, columns]) → the exact sums, int32 [rows, columns]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: (int8 [rows, length], float32 [blocks of rows, runs], rows of a block, the same of the right matrix turned, run)
#: → float32 [rows, columns]: the exact sum of each run, scaled and added in the order of runs
RunProduct: TypeAlias = Callable[[Tensor, Tensor, int, Tensor, Tensor, int, int], Tensor]
_Call = TypeVar("_Call", Product, RunProduct)


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
    #: elements of a sum after which a scale changes; 0: no scale changes within a sum
    run: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel(Generic[_Call]):
    """One row of the table."""

    name: str
    device: str
    #: an empty string, or the reason why the kernel cannot compute a product
    explain: Callable[[Facts], str]
    #: an empty string, or the reason why the float kernel is faster
    weigh: Callable[[Facts], str]
    call: _Call


def weigh_products(facts: Facts, least: int) -> str:
    """Say that the float kernel is as fast for fewer than `least` products; empty: there are more."""
    products = facts.rows * facts.length * facts.columns
    return "" if products >= least else f"float is as fast for {products} products; valid: {least} or more"
