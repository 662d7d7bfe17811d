"""The ONNX local functions of quantizers that measure their tensor: standard operators only, exact to the bit.

ONNX reads no bits of a float below opset 26, and `Floor(Log(x))` is off by one beside powers of two. So the logarithm
is a first guess, which one comparison with the powers of two beside it corrects; powers come from a table.
"""

import math
from typing import Any, Final

import numpy as np
import onnx
from onnxscript import script
from onnxscript.onnx_opset import opset21
from onnxscript.values import Opset

#: the domain of the functions, and of the nodes that stand for quantizers while a model is built
DOMAIN: Final = "qcompiler"
_own = Opset(DOMAIN, 1)
op: Any = opset21

#: stored exponent → factor: 2^(code − 127), 255 is NaN (runtime/scales.py); code 0 is never stored
_FACTORS = onnx.numpy_helper.from_array(
    np.array([0.0, *(math.ldexp(1, code - 127) for code in range(1, 255)), math.nan], np.float32), "factors"
)
#: stored exponent → 1 / factor
_INVERSES = onnx.numpy_helper.from_array(
    np.array([0.0, *(math.ldexp(1, 127 - code) for code in range(1, 255)), math.nan], np.float32), "inverses"
)
#: factors of SAWB have 3 decimals
_DIGITS = onnx.numpy_helper.from_array(np.array(1000.0), "digits")
_LOG2E: Final = 1 / math.log(2)
_SMALLEST: Final = 2.0**-126


@script(_own, default_opset=op)
def SharedExponent(  # noqa: N802
    x, axes, magnitude_bits: int = 7, edge: float = 1.0, above: int = 0, below: int = 0, negative: float = -1.0
):
    """The exponent + 127 of the step of each block, uint8; 255 where the block holds a NaN or an infinity.

    e = floor(log2 amax), with amax over `axes`; the code is e + 128 − magnitude_bits, one more where `above` and
    amax > edge·2^e, one less where `below` and amax <= edge·2^e; at least 1, at most 254.

    `negative` is −1 where amax is that of |x|, and 0 for formats without negative codes.
    """
    magnitude = op.Max(x, x * op.Constant(value_float=negative))
    unfit = op.IsNaN(op.ReduceSum(x * op.Constant(value_float=0.0), axes, keepdims=1, noop_with_empty_axes=1))
    one = op.Constant(value_float=1.0)
    amax = op.Where(
        unfit,
        one,
        op.Max(op.ReduceMax(magnitude, axes, keepdims=1, noop_with_empty_axes=1), op.Constant(value_float=_SMALLEST)),
    )
    guess = op.Clip(
        op.Floor(op.Log(amax) * op.Constant(value_float=_LOG2E)),
        op.Constant(value_float=-126.0),
        op.Constant(value_float=127.0),
    )
    factors = op.Constant(value=_FACTORS)
    shift = op.Constant(value_float=127.0)
    near = op.Gather(factors, op.Cast(guess + shift, to=6))
    too_high = op.Cast(near > amax, to=1)
    too_low = op.Cast(amax >= near + near, to=1)
    exponent = guess - too_high + too_low
    power = op.Gather(factors, op.Cast(exponent + shift, to=6))
    is_above = op.Cast(amax > power * op.Constant(value_float=edge), to=1)
    plus = is_above * op.Cast(op.Constant(value_int=above), to=1)
    minus = (one - is_above) * op.Cast(op.Constant(value_int=below), to=1)
    bits = op.Cast(op.Constant(value_int=magnitude_bits), to=1)
    code = op.Clip(exponent + op.Constant(value_float=128.0) - bits + plus - minus, one, op.Constant(value_float=254.0))
    return op.Cast(op.Where(unfit, op.Constant(value_float=255.0), code), to=2)


@script(_own, default_opset=op)
def ExponentFactor(exponent):  # noqa: N802
    """2^(exponent − 127); NaN for 255."""
    return op.Gather(op.Constant(value=_FACTORS), op.Cast(exponent, to=6))


@script(_own, default_opset=op)
def HyperblockQuantize(x, exponent, lowest: float = -127.0, largest: float = 127.0, to: int = 3):  # noqa: N802
    """The codes of `x` by stored exponents: clip(round(x / 2^(exponent − 127)), lowest, largest); 0 in a NaN block."""
    real = op.Round(x * op.Gather(op.Constant(value=_INVERSES), op.Cast(exponent, to=6)))
    codes = op.Where(op.IsNaN(real), op.Constant(value_float=0.0), real)
    low, high = op.Constant(value_float=lowest), op.Constant(value_float=largest)
    return op.Cast(op.Clip(codes, low, high), to=to)


@script(_own, default_opset=op)
def HyperblockDequantize(codes, exponent):  # noqa: N802
    """code · 2^(exponent − 127) as float32; NaN throughout a NaN block."""
    return op.Cast(codes, to=1) * op.Gather(op.Constant(value=_FACTORS), op.Cast(exponent, to=6))


@script(_own, default_opset=op)
def RangeScale(x, axes, largest: float = 127.0, negative: float = -1.0):  # noqa: N802
    """amax / largest of each block, at least 2^−126; NaN where the block holds a NaN or an infinity."""
    magnitude = op.Max(x, x * op.Constant(value_float=negative))
    unfit = op.IsNaN(op.ReduceSum(x * op.Constant(value_float=0.0), axes, keepdims=1, noop_with_empty_axes=1))
    amax = op.ReduceMax(magnitude, axes, keepdims=1, noop_with_empty_axes=1)
    scale = op.Max(amax / op.Constant(value_float=largest), op.Constant(value_float=_SMALLEST))
    return op.Where(unfit, op.Constant(value_float=math.nan), scale)


@script(_own, default_opset=op)
def SawbScale(x, axes, root_factor: float = 12.68, mean_factor: float = 12.8, largest: float = 7.0):  # noqa: N802
    """min(|root_factor·√E[x²] − mean_factor·E|x||, max|x|) / largest of each block; NaN where it is not finite.

    Means are float64. Attributes are float32: the factors, of 3 decimals, are rounded to these again.
    """
    zero, digits = op.Constant(value_float=0.0), op.Constant(value=_DIGITS)
    unfit = op.IsNaN(op.ReduceSum(x * zero, axes, keepdims=1, noop_with_empty_axes=1))
    size = op.Abs(op.Cast(x, to=11))
    total = op.ReduceSum(size, axes, keepdims=1, noop_with_empty_axes=1)
    members = op.Cast(op.Size(x), to=11) / op.Cast(op.Size(total), to=11)
    c1 = op.Round(op.Cast(op.Constant(value_float=root_factor), to=11) * digits) / digits
    c2 = op.Round(op.Cast(op.Constant(value_float=mean_factor), to=11) * digits) / digits
    root = op.Sqrt(op.ReduceSum(size * size, axes, keepdims=1, noop_with_empty_axes=1) / members)
    clip = op.Cast(op.Abs(c1 * root - c2 * (total / members)), to=1)
    high = op.Min(clip, op.ReduceMax(op.Abs(x), axes, keepdims=1, noop_with_empty_axes=1))
    scale = op.Max(high / op.Constant(value_float=largest), op.Constant(value_float=_SMALLEST))
    return op.Where(unfit, op.Constant(value_float=math.nan), scale)


@script(_own, default_opset=op)
def AffineScale(x, axes, largest: float = 255.0):  # noqa: N802
    """(scale, zero point as float32) of each block: high/largest − low/largest, low <= 0 <= high; NaN, 0 if unfit."""
    zero = op.Constant(value_float=0.0)
    levels = op.Constant(value_float=largest)
    unfit = op.IsNaN(op.ReduceSum(x * zero, axes, keepdims=1, noop_with_empty_axes=1))
    low = op.Min(op.ReduceMin(x, axes, keepdims=1, noop_with_empty_axes=1), zero)
    high = op.Max(op.ReduceMax(x, axes, keepdims=1, noop_with_empty_axes=1), zero)
    scale = op.Max(high / levels - low / levels, op.Constant(value_float=_SMALLEST))
    point = op.Clip(op.Round(op.Neg(low) / scale), zero, levels)
    return op.Where(unfit, op.Constant(value_float=math.nan), scale), op.Where(unfit, zero, point)


@script(_own, default_opset=op)
def RangeQuantize(  # noqa: N802
    x, scale, zero_point, lowest: float = -127.0, largest: float = 127.0, to: int = 3
):
    """clip(round(x / scale) + zero_point, lowest, largest); the zero point where the scale is NaN."""
    real = op.Round(x / scale)
    codes = op.Where(op.IsNaN(real), op.Constant(value_float=0.0), real) + zero_point
    low, high = op.Constant(value_float=lowest), op.Constant(value_float=largest)
    return op.Cast(op.Clip(codes, low, high), to=to)


@script(_own, default_opset=op)
def RangeDequantize(codes, scale, zero_point):  # noqa: N802
    """(code − zero_point) · scale as float32; NaN throughout a NaN block."""
    return (op.Cast(codes, to=1) - zero_point) * scale


@script(_own, default_opset=op)
def TwoLevelScale(x, axes, reach: float = 6.0, negative: float = -1.0):  # noqa: N802
    """e4m3(amax / reach / unit) · unit of each block, unit = (largest amax of all) / (reach · 448); NaN where unfit."""
    zero, smallest = op.Constant(value_float=0.0), op.Constant(value_float=_SMALLEST)
    end = op.Constant(value_float=reach)
    unfit = op.IsNaN(op.ReduceSum(x * zero, axes, keepdims=1, noop_with_empty_axes=1))
    magnitude = op.Max(x, x * op.Constant(value_float=negative))
    amax = op.Where(unfit, zero, op.ReduceMax(magnitude, axes, keepdims=1, noop_with_empty_axes=1))
    unit = op.Max(op.ReduceMax(amax, keepdims=0) / (end * op.Constant(value_float=448.0)), smallest)
    inner = op.Cast(op.Cast(amax / end / unit, to=17), to=1)
    scale = op.Max(op.Max(inner, op.Constant(value_float=2.0**-9)) * unit, smallest)
    return op.Where(unfit, op.Constant(value_float=math.nan), scale)


@script(_own, default_opset=op)
def MinifloatRound(real, mantissa_bits: int = 1, first_exponent: int = 0, largest: float = 6.0):  # noqa: N802
    """The level of a float format of few bits nearest to each number, ties to the even code; NaN stays NaN.

    Levels are multiples of 2^(max(e, first_exponent) − mantissa_bits) with e = floor(log2 |real|), up to `largest`.
    """
    one, two = op.Constant(value_float=1.0), op.Constant(value_float=2.0)
    shift, factors = op.Constant(value_float=127.0), op.Constant(value=_FACTORS)
    bits, first = (
        op.Cast(op.Constant(value_int=mantissa_bits), to=1),
        op.Cast(op.Constant(value_int=first_exponent), to=1),
    )
    number = op.Where(op.IsNaN(real), one, real)
    size = op.Min(op.Abs(number), op.Constant(value_float=largest))
    logarithm = op.Log(op.Max(size, op.Constant(value_float=_SMALLEST))) * op.Constant(value_float=_LOG2E)
    guess = op.Clip(op.Floor(logarithm), op.Constant(value_float=-126.0), op.Constant(value_float=126.0))
    near = op.Gather(factors, op.Cast(guess + shift, to=6))
    found = guess - op.Cast(near > size, to=1) + op.Cast(size >= near + near, to=1)
    exponent = op.Max(found, first)
    step = op.Gather(factors, op.Cast(exponent - bits + shift, to=6))
    place = size / step
    odd = op.Mod(exponent - first, two, fmod=1)
    # without mantissa the places are 1 and 2, and the even code is that of every other power of two
    is_tie = op.And(place == op.Constant(value_float=1.5), bits == op.Constant(value_float=0.0))
    digits = op.Where(is_tie, two - odd, op.Round(place))
    level = op.Where(number < op.Constant(value_float=0.0), op.Neg(digits * step), digits * step)
    return op.Where(op.IsNaN(real), op.Constant(value_float=math.nan), level)


FUNCTIONS: Final[dict[str, Any]] = {
    function.name: function
    for function in (
        SharedExponent,
        ExponentFactor,
        HyperblockQuantize,
        HyperblockDequantize,
        RangeScale,
        SawbScale,
        AffineScale,
        RangeQuantize,
        RangeDequantize,
        TwoLevelScale,
        MinifloatRound,
    )
}
