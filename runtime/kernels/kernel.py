"""What a kernel is, and what it is told of a product before the product runs."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from qcompiler.runtime.numbers.formats import Format

#: (int8 [rows, length], int8 [length, columns]) → the exact sums, int32 [rows, columns]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table."""

    name: str
    device: str
    #: an empty string, or the reason why the kernel cannot compute a product
    explain: Callable[[Facts], str]
    #: an empty string, or the reason why the float kernel is faster
    weigh: Callable[[Facts], str]
    call: Product
