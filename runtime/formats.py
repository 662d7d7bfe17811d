"""Integer number formats: which codes exist and how they are stored."""

import dataclasses
import enum
import re

import torch


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
    """A uniform integer grid of `bits` bits; zero is always one of its levels.

    `str(format)` is `int8`, `uint4`, `affine8`; `parse_format(str(f)) == f`.

    Raises:
        ValueError: `bits` is not one of 2–8 or 16.
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
    def dtype(self) -> torch.dtype:
        """Storage of one unpacked code."""
        if self.bits == 16:
            return torch.int16 if self.kind is Kind.SIGNED else torch.uint16
        return torch.int8 if self.kind is Kind.SIGNED else torch.uint8

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}"


def parse_format(text: str) -> IntFormat:
    """The format that `str` wrote: `int4`, `uint8`, `affine16`.

    Raises:
        ValueError: the text names no format.
    """
    match = re.fullmatch(r"(int|uint|affine)(\d+)", text)
    if match is None:
        raise ValueError(f"number format: got {text!r}; valid: int, uint or affine followed by the bits, such as int8")
    return IntFormat(int(match[2]), Kind(match[1]))
