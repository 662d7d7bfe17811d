"""Scales: from the range of a block to its scale, and from the stored scale to the factor of dequantization.

A power-of-two scale is stored as one byte, the exponent plus 127 (as in the E8M0 format of OCP MX): 1 … 254 mean
2^(code−127), 255 means NaN: the block held a NaN or an infinity. Exponents come from the bits of the float, never from
log2, which is wrong beside powers of two.
"""

import torch

from qcompiler.runtime.formats import Kind
from qcompiler.runtime.rounding import stored
from qcompiler.runtime.spec import QuantSpec, Scale

NAN_EXPONENT = 255
_MANTISSA = (1 << 23) - 1


def power_of_two(amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The exponent of each block's step plus 127, uint8; 255 where amax is not finite.

    With amax = f·2^E, ½ ≤ f < 1, and m magnitude bits, `max` gives the step 2^(E−m); `fit` gives one more where
    amax > (2^m − 1)·2^(E−m), that is where f > 1 − 2^−m: a comparison of mantissa bits. The step never falls below
    2^−126, so subnormal blocks round on that grid instead of vanishing; amax = 0 gets 2^−126 too (all codes are 0).
    Nor does it rise above 2^127, which only 2-bit codes of values above 2^127 would need: those saturate.

    Example: b = 8 (m = 7), amax = 1 = ½·2¹: step 2^−6, code 64. amax = 127.5/64: step 2^−6 (`max`, code 127,
    saturated) or 2^−5 (`fit`, code 64).
    """
    bits = amax.view(torch.int32)
    field = (bits >> 23) & 255
    m = spec.format.magnitude_bits
    code = field + 1 - m  # E = field − 126, and 127 is added for storage
    if spec.scale is Scale.FIT:
        code = code + ((bits & _MANTISSA) > (1 << 23) - (1 << (24 - m))).to(torch.int32)
    code = torch.where(field == 255, NAN_EXPONENT, code.clamp(1, 254))
    return code.to(torch.uint8)


def real_scale(low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """high/levels − low/levels as float32 (the difference of the quotients: high − low could overflow).

    At least 2^−126, so that an all-zero block has codes 0; NaN where an end of the range is not finite.
    """
    scale = (high / levels - low / levels).clamp(min=2.0**-126)
    return torch.where(torch.isfinite(high) & torch.isfinite(low), scale, torch.nan)


def from_ends(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The scale of blocks with the range low ≤ 0 ≤ high, by the spec's scale rule; stored as the rule stores it."""
    if spec.has_zero_point:
        return real_scale(low, high, spec.format.qmax)
    amax = high if spec.format.kind is Kind.UNSIGNED else torch.maximum(-low, high)
    if spec.scale is Scale.REAL:
        return real_scale(torch.zeros_like(amax), amax, spec.format.qmax)
    return power_of_two(amax, spec)


def factor(scale: torch.Tensor) -> torch.Tensor:
    """What a code is multiplied by: float32, 2^(code−127) for stored exponents; NaN for a NaN block."""
    if scale.dtype != torch.uint8:
        return scale
    code = scale.to(torch.int32)
    return stored(torch.where(code == NAN_EXPONENT, torch.nan, (code << 23).view(torch.float32)))


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """What a value is multiplied by before rounding: 1 / factor, exact, for stored exponents; NaN for a NaN block."""
    return stored(factor(scale).reciprocal())
