"""Floating formats of few bits: the levels, and exact encoding and decoding on the bits of float32."""

import dataclasses
import enum
import math
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.integers import Kind
from qcompiler.runtime.numbers.rounding import round_code


class Top(enum.StrEnum):
    """The meaning of the largest codes of a float format; the value is the suffix of formats that overflow to that."""

    #: numbers like all others
    FINITE = ""
    #: the last code is NaN (OCP FP8 E4M3)
    NAN = "nan"
    #: the last exponent holds infinity, and NaN behind (IEEE 754, OCP FP8 E5M2)
    IEEE = "inf"


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A sign, an exponent field e and a mantissa field M of m bits; the code is these bits in this order.

        e > 0: ±(1 + M/2^m)·2^(e − bias)        e = 0: ±(M/2^m)·2^(1 − bias), subnormal; M = 0: ±0

    So zero is always a level, formats without mantissa have a zero beside the powers of two, and the sign of zero is
    kept. `str(format)` is `e4m3`, with the differences behind: `b11` (a bias of its own), `r4` (radix 4), `r4x2`, and
    `nan` or `inf` (overflow); `parse_format(str(f)) == f`.

    | name | largest | smallest | source |
    |---|---|---|---|
    | `e4m3`, `e4m3nan` | 448 | 2^−9 | OCP 8-bit Floating Point Specification 1.0 (2023), E4M3 |
    | `e5m2`, `e5m2inf` | 57344 | 2^−16 | the same, E5M2; Wang et al., NeurIPS 2018 (1-5-2) |
    | `e3m2`, `e2m3`, `e2m1` | 28, 7.5, 6 | 1/16, ⅛, ½ | OCP Microscaling Formats 1.0 (2023), FP6 and FP4 |
    | `e4m3b11` | 30 | 2^−13 | HFP8, Sun et al., NeurIPS 2019: 1-4-3, bias 4 above the usual 7 |
    | `e3m0` | 16 | ¼ | LUQ, Chmiel et al., ICLR 2023: FP4 [1,3,0], seven powers of two |
    | `e3m0r4`, `e3m0r4x2` | 64, 128 | 1/64, 1/32 | Sun et al., NeurIPS 2020: FP4 [1,3,0], radix 4, two phases |
    | `e5m10` | 65504 | 2^−24 | IEEE 754 binary16 |

    Overflow: a number that rounds above `largest` saturates. OCP MX and NVFP4 say so, and we take the same for FP8 of
    2018 and HFP8, whose policy we could not check. With the suffix the number becomes NaN (`e4m3nan`) or infinity
    (`e5m2inf`), as a plain cast does (ml_dtypes; "non-saturating" in OCP FP8), and dynamic loss scaling then sees the
    overflow.

    Raises:
        ValueError: widths, bias or radix that are not supported, or overflow in a format without NaN and infinity.
    """

    exponent_bits: int
    mantissa_bits: int
    #: None: 2^(exponent_bits−1) − 1. A format with a bias of its own has numbers only, no NaN and no infinity.
    bias: int | None = None
    #: 2, or 4: every level four times the one before, without mantissa, 4^(e − 2^(exponent_bits−1))
    radix: int = 2
    #: radix 4: the second phase, with every level twice as large; scale rules treat both phases alike
    doubled: bool = False
    #: False: a number that rounds above `largest` becomes NaN or infinity
    saturates: bool = True

    def __post_init__(self) -> None:
        if self.exponent_bits not in range(1, 7) or self.mantissa_bits < 0 or self.bits not in (*range(3, 9), 16):
            raise ValueError(
                f"float format: e{self.exponent_bits}m{self.mantissa_bits} is not supported; valid: 1 to 6 exponent "
                "bits, and 3 to 8 or 16 bits together with the sign"
            )
        if self.bias is not None and self.bias not in range(2**self.exponent_bits):
            valid = f"0 to {2**self.exponent_bits - 1}, so that the largest level is at least 1"
            raise ValueError(f"float format: bias {self.bias} is not supported; valid: {valid}")
        if self.radix not in (2, 4) or (self.radix == 4 and (self.mantissa_bits or self.bias is not None)):
            raise ValueError(f"float format: got radix {self.radix}; valid: 2, or 4 without mantissa and bias")
        if self.doubled and self.radix != 4:
            raise ValueError("float format: doubled is the second phase of radix 4; got radix 2")
        if not self.saturates and self.top is Top.FINITE:
            raise ValueError("float format: no NaN and no infinity to overflow to; valid: saturates=True")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def kind(self) -> Kind:
        """Levels lie symmetrically around zero, so a range is one magnitude."""
        return Kind.SIGNED

    @property
    def dtype(self) -> torch.dtype:
        """Storage of one unpacked code."""
        return torch.uint16 if self.bits == 16 else torch.uint8

    @property
    def top(self) -> Top:
        """The meaning of the largest codes: special in `e4m3`, `e5m2` and 16 bits, numbers elsewhere."""
        if self.bias is None and self.bits == 16:
            return Top.IEEE
        special = {(4, 3): Top.NAN, (5, 2): Top.IEEE} if self.bias is None else {}
        return special.get((self.exponent_bits, self.mantissa_bits), Top.FINITE)

    @property
    def last_code(self) -> int:
        """The code of `largest`."""
        codes = 1 << (self.bits - 1)
        return codes - 1 - {Top.FINITE: 0, Top.NAN: 1, Top.IEEE: 1 << self.mantissa_bits}[self.top]

    @property
    def first_exponent(self) -> int:
        """The exponent of the smallest level that is not subnormal."""
        if self.radix == 4:
            return 2 - (1 << self.exponent_bits) + self.doubled
        return 1 - ((1 << (self.exponent_bits - 1)) - 1 if self.bias is None else self.bias)

    @property
    def largest(self) -> float:
        """The largest finite level."""
        octaves = max((self.last_code >> self.mantissa_bits) - 1, 0)
        digits = self.last_code - (octaves << self.mantissa_bits)
        return math.ldexp(digits, self.first_exponent - self.mantissa_bits + octaves * (self.radix // 2))

    @property
    def smallest(self) -> float:
        """The smallest level above zero."""
        return math.ldexp(1, self.first_exponent - self.mantissa_bits)

    @property
    def lowest(self) -> float:
        """−largest."""
        return -self.largest

    @property
    def reach(self) -> float:
        """The number at which scale rules put the end of a range: `largest`, of the first phase also in the second."""
        return self.largest / 2 if self.doubled else self.largest

    @property
    def magnitude_bits(self) -> int:
        """m with 2^(m−1) ≤ reach < 2^m: the exponent of the largest binade (`emax` of OCP MX) plus 1."""
        return math.frexp(self.reach)[1]

    @property
    def nan_code(self) -> int:
        """The code of NaN, quiet in IEEE; 0 if the format has none."""
        quiet = (1 << self.mantissa_bits) // 2
        return {Top.FINITE: 0, Top.NAN: self.last_code + 1, Top.IEEE: self.last_code + 1 + quiet}[self.top]

    def encode(self, real: Tensor, noise: Tensor | None, zero: Tensor | None = None) -> Tensor:
        """Return the code of one of the two levels beside each number, as `dtype`.

        To nearest, ties to the even code; or stochastically, the upper one with the probability of the distance to the
        lower (below the smallest level s: ±s with probability |x|/s, else ±0). NaN becomes `nan_code`; infinities
        overflow like large numbers.

        Args:
            real: float32, x / factor.
            noise: `random_bits` to round stochastically; None: to nearest.
            zero: None: float formats have no zero point.
        """
        number = torch.where(real == real, real, 0.0)
        size = number.abs().clamp(max=self.largest if self.saturates else 2.0**self.magnitude_bits)
        field, place = self._place(size)
        digits = round_code(place, noise).to(torch.int32)
        if self.mantissa_bits == 0 and noise is None:
            digits = torch.where(place == 1.5, 2 - (field & 1), digits)
        code = ((field << self.mantissa_bits) + digits).clamp(max=self.last_code + (not self.saturates))
        code = code + ((number.view(torch.int32) >> 31) & (1 << (self.bits - 1)))
        return torch.where(real == real, code, self.nan_code).to(self.dtype)

    def _place(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """(binades below |x|, not counting the first; |x| in steps of that binade).

        The step is a power of two, so this is an exact product, and rounding the product to an integer rounds |x| once.
        In radix 4 the place between two levels is 1 + (|x|/lower − 1)/3, rounded to float32.
        """
        low, m = self.first_exponent + 127, self.mantissa_bits
        octave = ((size.view(torch.int32) >> 23) - low).clamp(min=0)
        if self.radix == 2:
            return octave, size * ((254 + m - low - octave) << 23).view(torch.float32)
        octave = octave & ~1
        place = size * ((254 - low - octave) << 23).view(torch.float32)
        return octave >> 1, torch.where(place > 1, (place - 1) / 3 + 1, place)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the level of each code as float32, exact."""
        m, sign = self.mantissa_bits, 1 << (self.bits - 1)
        words = codes.to(torch.int32)
        size = words & (sign - 1)
        octave = (size >> m).clamp(min=1) - 1
        digits = (size - (octave << m)).to(torch.float32)
        level = digits * ((octave * (self.radix // 2) + self.first_exponent + 127 - m) << 23).view(torch.float32)
        if self.top is not Top.FINITE:
            level = torch.where(size > self.last_code, torch.nan, level)
        if self.top is Top.IEEE:
            level = torch.where(size == self.last_code + 1, torch.inf, level)
        return torch.where(words >= sign, -level, level)

    def __str__(self) -> str:
        radix = f"r{self.radix}" + "x2" * self.doubled if self.radix != 2 else ""
        bias = "" if self.bias is None else f"b{self.bias}"
        return f"e{self.exponent_bits}m{self.mantissa_bits}{bias}{radix}{'' if self.saturates else self.top}"


#: the element format of MXFP8, and the format of block scales in NVFP4
E4M3: Final = FloatFormat(4, 3)
