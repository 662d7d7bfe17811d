"""Number formats and names: integers and floats, with one surface for both.

Every format has `bits`, `kind`, `dtype` (storage of one code), `largest` and `lowest` (values at scale 1), `reach` and
`magnitude_bits` (for scale rules: 2^(m−1) ≤ reach < 2^m), `encode` and `decode`.
"""

import re
from typing import TypeAlias

from qcompiler.runtime.numbers.floats import FloatFormat
from qcompiler.runtime.numbers.integers import BITS, IntFormat, Kind

__all__ = ["BITS", "FloatFormat", "Format", "IntFormat", "Kind", "parse_format"]

Format: TypeAlias = IntFormat | FloatFormat

_INT = re.compile(r"(int|uint|affine)(\d+)")
_FLOAT = re.compile(r"e(\d)m(\d{1,2})(?:b(\d{1,2})|r(4)(x2)?)?(nan|inf)?")


def parse_format(text: str) -> Format:
    """Return the format that `str` wrote: `int4`, `uint8`, `affine16`, `e4m3`, `e5m2inf`, `e4m3b11`, `e3m0r4x2`.

    Raises:
        ValueError: the text names no format.
    """
    if match := _INT.fullmatch(text):
        return IntFormat(int(match[2]), Kind(match[1]))
    if match := _FLOAT.fullmatch(text):
        exponent, mantissa, bias, radix, doubled, overflow = match.groups()
        form = FloatFormat(
            int(exponent),
            int(mantissa),
            bias=None if bias is None else int(bias),
            radix=int(radix or 2),
            doubled=doubled is not None,
            saturates=overflow is None,
        )
        if overflow in (None, form.top):
            return form
        raise ValueError(f"number format: got {text!r}, which does not overflow to {overflow}; valid: {form}")
    raise ValueError(
        f"number format: got {text!r}; valid: int, uint or affine followed by the bits, such as int8, or e and m with "
        "the bits of exponent and mantissa, such as e4m3"
    )
