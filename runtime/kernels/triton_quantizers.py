"""Quantizers in Triton: range, exponent, codes and floats in one pass. Imported at the first use (quantizers.py).

A program holds whole blocks, a row of its tile each. The axes are those of the C++ (memory.py), and so are the numbers:
both write the bits of runtime/references.py.
"""

import math
from typing import Final, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.runtime.kernels.memory import Axis
from qcompiler.runtime.kernels.quantize_blocks import Call, Results, make_task
from qcompiler.runtime.kernels.triton_support import EXACT, MOST_IN_PROGRAM

#: elements of a tile: small blocks share a program
_TILE: Final = 1024
#: of an axis: extent, edge, elements of it in a row, stride of the scales, logical stride, stride in memory; rows and
#: elements of a row along the axes behind
_Place: TypeAlias = tuple[int, int, int, int, int, int, int, int]
_NAN: Final = tl.constexpr(0x7FC00000)
_INFINITY: Final = tl.constexpr(0x7F800000)
_SMALLEST: Final = tl.constexpr(2.0**-126)
_NAN_EXPONENT: Final = tl.constexpr(255)
#: neighboring indices far apart (runtime/numbers/rounding.py)
_SPREAD: Final = tl.constexpr(0x9E3779B1)
#: beyond any code, and within ±2²², where `_ROUNDER` works
_BEYOND: Final = tl.constexpr(2.0**20)
#: x + 1.5·2²³ is rounded to an integer, to nearest with ties to even
_ROUNDER: Final = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _mix_bits(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _find_exponent(largest, rule: tl.constexpr):
    """Return the exponent of blocks from the bits of their largest magnitude: `power_of_two` of runtime/scales.py."""
    field, mantissa = largest >> 23, largest & 0x7FFFFF
    code = field + 1 - rule[0] + (mantissa > rule[1]).to(tl.int32) - (mantissa <= rule[2]).to(tl.int32)
    code = tl.minimum(tl.maximum(code, rule[3]), rule[4])
    return tl.where(field == 255, _NAN_EXPONENT, code)


@triton.jit
def _find_real_scale(largest, reach):
    """Return the scale of blocks from the bits of their largest magnitude: `real_scale` of runtime/scales.py."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, reach, tl.float32))
    scale = tl.where(scale < _SMALLEST, _SMALLEST, scale)
    return tl.where(largest >= _INFINITY, tl.full(largest.shape, _NAN, tl.int32).to(tl.float32, bitcast=True), scale)


@triton.jit
def _round_nearest(real):
    return (real + _ROUNDER) - _ROUNDER


@triton.jit
def _round_stochastic(real, bits):
    """Return ⌊x⌋ or ⌊x⌋+1: `round_stochastic` of runtime/numbers/rounding.py."""
    whole = real.to(tl.int32).to(tl.float32)
    floor = tl.where(whole > real, whole - 1.0, whole)
    number = (bits >> 8).to(tl.int32).to(tl.float32)
    return floor + (number < (real - floor) * 16777216.0).to(tl.float32)


@triton.jit
def _locate_elements(row, element, axes: tl.constexpr):
    """Return the places of elements in memory and in the row-major index, of the scales of rows, and which exist."""
    place = row * 0 + element * 0
    logical, scale_place, inside = place, row * 0, place == 0
    for i in tl.static_range(len(axes)):
        extent, edge, step, scale_step, logical_step, stride, rows_behind, elements_behind = axes[i]
        first = row // rows_behind % ((extent + step - 1) // step) * step
        position = first + element // elements_behind % step
        inside = inside & (position < extent)
        place += position * stride
        logical += position * logical_step
        scale_place += first // edge * scale_step
    return place, logical, scale_place, inside


@triton.jit
def _get_factor(exponent):
    return tl.where(exponent == _NAN_EXPONENT, _NAN, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _get_inverse(exponent):
    bits = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)  # 2⁻¹²⁷ is subnormal
    return tl.where(exponent == _NAN_EXPONENT, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _draw_bits(key, site, logical):
    """Return the random bits of elements: `random_bits` of runtime/numbers/rounding.py."""
    seed = _mix_bits((tl.load(key) ^ site).to(tl.uint32, bitcast=True))
    seed = _mix_bits(seed ^ tl.load(key + 1).to(tl.uint32, bitcast=True))
    return _mix_bits(seed + logical.to(tl.uint32, bitcast=True) * _SPREAD)


@triton.jit
def _quantize_tile(
    x,
    codes,
    floats,
    scales,
    zero_points,
    key,
    site,
    rows,
    axes: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    count: tl.constexpr,
    finds: tl.constexpr,
    is_real: tl.constexpr,
    is_stochastic: tl.constexpr,
    has_zero: tl.constexpr,
    has_codes: tl.constexpr,
    has_floats: tl.constexpr,
    shows: tl.constexpr,
    rule: tl.constexpr,
    reach: tl.constexpr,
    lowest: tl.constexpr,
    highest: tl.constexpr,
):
    row = tl.program_id(0) * count + tl.arange(0, count)[:, None]
    element = tl.arange(0, padded)[None, :]
    place, logical, scale_place, inside = _locate_elements(row, element, axes)
    inside = inside & (row < rows) & (element < size)
    value = tl.load(x + place, mask=inside, other=0.0)
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as bits, so that NaN is the largest

    if finds:
        largest = tl.max(magnitude, axis=1, keep_dims=True)
        scale = _find_real_scale(largest, reach) if is_real else _find_exponent(largest, rule)
        tl.store(scales + scale_place, scale.to(scales.dtype.element_ty), mask=row < rows)
    else:
        scale = tl.load(scales + scale_place, mask=row < rows, other=1)
    if is_real:
        factor = scale
        real = tl.div_rn(value, tl.broadcast_to(scale, [count, padded]))
    else:
        factor = _get_factor(scale.to(tl.int32))
        real = value * _get_inverse(scale.to(tl.int32))

    real = tl.where(real == real, tl.where(real < -_BEYOND, -_BEYOND, tl.where(real > _BEYOND, _BEYOND, real)), 0.0)
    rounded = _round_stochastic(real, _draw_bits(key, site, logical)) if is_stochastic else _round_nearest(real)
    zero = tl.load(zero_points + scale_place, mask=row < rows, other=0).to(tl.float32) if has_zero else 0.0
    rounded = rounded + zero
    code = tl.where(rounded < lowest, lowest, tl.where(rounded > highest, highest, rounded))
    if has_codes:
        tl.store(codes + place, code.to(tl.int32).to(codes.dtype.element_ty), mask=inside)
    if has_floats:
        result = (code - zero) * factor
        tl.store(floats + place, tl.where(shows & (magnitude >= _INFINITY), float("nan"), result), mask=inside)


def quantize(call: Call, x: Tensor, results: Results, key: Tensor | None, zero: Tensor | None, *, finds: bool) -> str:
    """Write codes and floats of a dense float32 tensor, and the scales if the kernel finds them.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    task = make_task(call, results.scale.stride(), finds_scale=finds)
    if isinstance(task, str):
        return task
    places, rows, size = _place_rows(task.list_axes(), finds=finds)
    if not rows:
        return ""
    if size > MOST_IN_PROGRAM:
        return f"a block of {size} elements does not fit into one program; valid: {MOST_IN_PROGRAM}"
    padded = triton.next_power_of_2(size)
    count = max(1, _TILE // padded)
    with torch.cuda.device_of(x):  # which Triton calls; of a CPU, in the interpreter, nothing
        _quantize_tile[(triton.cdiv(rows, count),)](
            x,
            *(x if one is None else one for one in (results.codes, results.floats)),  # a pointer that nothing reads
            results.scale,
            *(x if one is None else one for one in (zero, key)),
            task.site - 2**32 * (task.site >= 2**31),  # as int32
            rows,
            axes=places,
            size=size,
            padded=padded,
            count=count,
            finds=finds,
            is_real=results.scale.is_floating_point(),
            is_stochastic=key is not None,
            has_zero=zero is not None,
            has_codes=results.codes is not None,
            has_floats=results.floats is not None,
            shows=call.shows,
            rule=(task.magnitude_bits, task.up, task.down, task.low, task.high),
            reach=task.reach,
            lowest=task.lowest,
            highest=task.largest,
            **EXACT,
        )
    return ""


def _place_rows(axes: tuple[Axis, ...], *, finds: bool) -> tuple[tuple[_Place, ...], int, int]:
    """Return the axes, the number of rows and the elements of a row: a row is a block, or an element by itself."""
    places: list[_Place] = []
    stride = rows = size = 1
    for axis in reversed(axes):
        step = axis.edge if finds else 1
        places.append((axis.extent, axis.edge, step, axis.scale, axis.logical, stride, rows, size))
        stride, rows, size = stride * axis.extent, rows * math.ceil(axis.extent / step), size * step
    return tuple(places), rows, size
