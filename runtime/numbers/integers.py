"""Integer formats: the codes, the storage, and the way from numbers to codes."""

import dataclasses
import enum

import torch
from torch import Tensor

from qcompiler.runtime.numbers.rounding import round_code


class Kind(enum.StrEnum):
    """How codes are laid out around zero."""

    #: symmetric: −(2^(b−1)−1) … +(2^(b−1)−1); −2^(b−1) is never used, so that negation stays exact
    SIGNED = "int"
    #: 0 … 2^b−1 with zero at code 0, for tensors that are never negative; negative values clip to 0
    UNSIGNED = "uint"
    #: 0 … 2^b−1 with zero at a code of its own (the zero point), for one-sided or shifted ranges
    AFFINE = "affine"


BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclasses.dataclass(frozen=True)
class IntFormat:
    """A uniform integer grid of `bits` bits; zero is always a level.

    `str(format)` is `int8`, `uint4`, `affine8`; `parse_format(str(f)) == f`.

    Raises:
        ValueError: `bits` is not one of `BITS`.
    """

    bits: int
    kind: Kind = Kind.SIGNED

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"integer format: {self.bits} bits are not supported; valid: {', '.join(map(str, BITS))}")

    @property
    def magnitude_bits(self) -> int:
        """Bits that hold the magnitude: b−1 for signed, b otherwise."""
        return self.bits - 1 if self.kind is Kind.SIGNED else self.bits

    @property
    def qmax(self) -> int:
        """Largest code: 2^magnitude_bits − 1."""
        return int(2**self.magnitude_bits - 1)

    @property
    def qmin(self) -> int:
        """Smallest code: −qmax for signed, 0 otherwise."""
        return -self.qmax if self.kind is Kind.SIGNED else 0

    @property
    def largest(self) -> float:
        """The largest value at scale 1: qmax."""
        return float(self.qmax)

    @property
    def lowest(self) -> float:
        """The smallest value at scale 1: qmin."""
        return float(self.qmin)

    @property
    def reach(self) -> float:
        """The number at which scale rules put the end of a range: `largest`."""
        return self.largest

    @property
    def dtype(self) -> torch.dtype:
        """Storage of one unpacked code."""
        if self.bits == 16:
            return torch.int16 if self.kind is Kind.SIGNED else torch.uint16
        return torch.int8 if self.kind is Kind.SIGNED else torch.uint8

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}"

    def encode(self, real: Tensor, noise: Tensor | None, zero: Tensor | None) -> Tensor:
        """clamp(round(real) + zero, qmin, qmax) as `dtype`; NaN becomes `zero`.

        Args:
            real: float32, x / factor.
            noise: `random_bits` to round stochastically; None: to nearest.
            zero: float32, the zero point of each element, for formats that have one.
        """
        codes = round_code(real, noise)
        codes = torch.where(codes == codes, codes, 0.0)
        if zero is not None:
            codes = codes + zero
        return codes.clamp(self.qmin, self.qmax).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the codes as float32."""
        return codes.to(torch.float32)
