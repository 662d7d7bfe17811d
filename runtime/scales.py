"""Scales: from the range of a block to the scale, and from the stored scale to the factor of dequantization.

A power-of-two scale is stored as one byte, the exponent plus 127 (as in the E8M0 format of OCP MX): 1 … 254 mean
2^(code−127), 255 means NaN: the block held a NaN or an infinity. Exponents come from the bits of the float, never from
log2, which is wrong beside powers of two.
"""

import math

import torch

from qcompiler.runtime.numbers.floats import E4M3
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.numbers.rounding import is_finite, store_once
from qcompiler.runtime.spec import QuantSpec, Scale

NAN_EXPONENT = 255
_MANTISSA = (1 << 23) - 1
#: the bits of NaN
_NAN = 0x7FC00000


def power_of_two(amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the exponent of each block's step plus 127, uint8; 255 if amax is not finite.

    With amax = f·2^E, ½ ≤ f < 1, and m magnitude bits, `max` gives the step 2^(E−m). The other rules give that or a
    neighbor, by a comparison of mantissa bits:

    - `fit` one more if amax > reach·2^(E−m): for integers f > 1 − 2^−m, for `e2m1` (reach 6 = ¾·2³) f > ¾;
    - `ceil` one less if f = ½, a power of two: 2^(⌈log2 amax⌉−m);
    - `round` one less if f < √½: 2^(round(log2 amax)−m);
    - `one` always 2⁰.

    The step never falls below 2^−126, so subnormal blocks round on that grid instead of vanishing; amax = 0 gets 2^−126
    too (all codes are 0). Nor does it rise above 2^127, which only m = 1 (`int2`) would need, for values above 2^127,
    which saturate.

    Example: b = 8 (m = 7), amax = 1 = ½·2¹: step 2^−6, code 64; `ceil`, `round`: 2^−7, code 128, saturated to 127.
    amax = 127.5/64: step 2^−6 (code 127, saturated) or, with `fit`, 2^−5 (code 64).
    """
    bits = amax.view(torch.int32)
    field, mantissa = (bits >> 23) & 255, bits & _MANTISSA
    code = field + 1 - spec.format.magnitude_bits  # E = field − 126, and 127 is added for storage
    if spec.scale is Scale.FIT:
        code = code + (mantissa > mantissa_of(spec.format.reach)).to(torch.int32)
    elif spec.scale is Scale.CEIL:
        code = code - (mantissa == 0).to(torch.int32)
    elif spec.scale is Scale.ROUND:
        code = code - (mantissa <= mantissa_of(math.sqrt(2))).to(torch.int32)
    elif spec.scale is Scale.ONE:
        code = torch.full_like(code, 127)
    code = torch.where(field == 255, NAN_EXPONENT, code.clamp(1, 254))
    return code.to(torch.uint8)


def mantissa_of(value: float) -> int:
    """Return the mantissa bits of the largest float32 that is not above `value`."""
    return int((2 * math.frexp(value)[0] - 1) * (1 << 23))


def real_scale(low: torch.Tensor, high: torch.Tensor, levels: float) -> torch.Tensor:
    """high/levels − low/levels as float32 (the difference of the quotients: high − low could overflow).

    At least 2^−126, so that an all-zero block has codes 0; NaN if an end of the range is not finite.
    """
    scale = (_divide(high, levels) - _divide(low, levels)).clamp(min=2.0**-126)
    return torch.where(is_finite(high) & is_finite(low), scale, torch.nan)


def _divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return the quotient, rounded once on every device.

    Away from the CPU torch multiplies by the reciprocal of a number, and Inductor does so with any constant: 1/127 is
    rounded, and so a product by it differs from the quotient in the last bit. A stored tensor is no constant.
    """
    if x.device.type == "cpu":
        return x / number
    return x / store_once(torch.full((), number, dtype=torch.float32, device=x.device))


def two_level_scale(amax: torch.Tensor, reach: float) -> torch.Tensor:
    """e4m3(amax/reach/unit)·unit as float32, with unit = (largest amax of all blocks)/(reach·448).

    The rule of NVFP4 (arXiv 2509.25149), with a reach of 6: a scale in E4M3 for each block, rounded to nearest, and one
    float32 for the tensor. Here the product of both is stored, 4 bytes a block: the rounding of the two levels is
    simulated, the storage is not. If the scale of the block was rounded down (by up to 1/17; by up to 1/3 among the
    subnormals of E4M3, in blocks far below the largest), amax saturates.

    E4M3 stays at the smallest level or above, and the product at 2^−126, so that no scale is 0; all-zero blocks have
    codes 0. A block that is not finite has the scale NaN and does not count for the unit. The unit makes every block
    depend a little on all others of the tensor, also of other samples.
    """
    if amax.numel() == 0:
        return amax
    finite = torch.where(is_finite(amax), amax, 0.0)
    unit = store_once(_divide(finite.amax(), reach * E4M3.largest).clamp(min=2.0**-126))
    inner = E4M3.decode(E4M3.encode(_divide(finite, reach) / unit, None)).clamp(min=E4M3.smallest)
    return torch.where(is_finite(amax), (inner * unit).clamp(min=2.0**-126), torch.nan)


def from_ends(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the scale of blocks with the range low ≤ 0 ≤ high, in the form that the scale rule stores."""
    reach = spec.format.reach
    if spec.has_zero_point:
        return real_scale(low, high, reach)
    amax = high if spec.format.kind is Kind.UNSIGNED else torch.maximum(-low, high)
    if spec.scale is Scale.REAL:
        return real_scale(torch.zeros_like(amax), amax, reach)
    if spec.scale is Scale.TWO_LEVEL:
        return two_level_scale(amax, reach)
    return power_of_two(amax, spec)


def find_zero_point(low: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the code of zero of blocks from `low` on: round(−low / scale) within the codes; 0 for a NaN block."""
    point = torch.round(-low / scale).clamp(0, spec.format.largest)
    return torch.where(point == point, point, 0.0).to(spec.format.dtype)


def get_factor(scale: torch.Tensor) -> torch.Tensor:
    """Return the factor of a code: float32, 2^(code−127) for stored exponents; NaN for a NaN block."""
    if scale.dtype != torch.uint8:
        return scale
    code = scale.to(torch.int32)
    # a choice of integers: of two NaN that it traces, a compiler does not know that they are one
    return store_once(torch.where(code == NAN_EXPONENT, _NAN, code << 23).view(torch.float32))


def get_inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / factor, which multiplies values before rounding; exact, for stored exponents; NaN for a NaN block."""
    return store_once(get_factor(scale).reciprocal())
