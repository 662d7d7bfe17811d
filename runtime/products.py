"""The product of two matrices of codes, or of a batch of those: integers are summed, and each sum is scaled once."""

import math
from typing import Final, TypeVar

import torch
from torch import Tensor

from qcompiler.runtime import scales
from qcompiler.runtime.kernels.kernel import Codes, Facts, is_shifted
from qcompiler.runtime.kernels.table import WHOLE_KERNELS, get_whole, multiply
from qcompiler.runtime.numbers.blocks import BlockView
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.spec import parse_spec

#: types of a result that one float32 can be rounded to
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
#: kernels that scale sums too
_WHOLE: Final = tuple(row.name for row in WHOLE_KERNELS)
_Point = TypeVar("_Point", Tensor, Tensor | int | None)


def matmul_codes(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    a_spec: str,
    b_spec: str,
    a_edge: int,
    b_edge: int,
    kernel: str,
    dtype: torch.dtype,
    a_run: int = 0,
    b_run: int = 0,
) -> Tensor:
    """Return float32(Σ (a − a's zero point)·(b − b's zero point)) · scales + bias, rounded once to `dtype`.

    The sum is exact. So the result is that of floats in any order of sums, if float32 holds every partial sum of those
    and scales are powers of two; else it differs by roundings alone. A NaN scale gives NaN throughout its rows or
    columns.

    With runs every run of a sum is exact by itself; the runs are scaled, and summed in float32 (`multiply_runs`).

    Args:
        a: codes [rows, length] or [batch, rows, length], as `quantize`, `unpack` or `patches` returns them.
        a_scale: one value for every `a_edge` rows, in their order throughout the batch, of any shape.
        a_zero_point: like `a_scale`, for formats that have one.
        b: codes [length, columns] or [batch, length, columns].
        b_scale: one value for every `b_edge` columns.
        b_zero_point: like `b_scale`.
        bias: broadcast to the result.
        a_spec: `str` of the `QuantSpec` of `a`.
        b_spec: that of `b`.
        a_edge: rows of `a` that share a scale.
        b_edge: columns of `b` that share a scale.
        kernel: the name of a kernel (runtime/kernels/table.py); empty: the reference.
        dtype: of the result.
        a_run: elements of a row after which the scale changes, for formats without zero points: `a_scale` then has a
            row of values for every block of rows; 0: the scale does not change.
        b_run: that of a column of `b`; `b_scale` then has a row of values for every block of columns.
    """
    if kernel in _WHOLE:
        own = bias if bias is not None and bias.shape == b.shape[1:] and bias.dtype is torch.float32 else None
        given = (a, a_scale, a_zero_point, b, b_scale, b_zero_point, own, a_spec, b_spec, a_edge, b_edge, kernel)
        values = torch.ops.qcompiler.multiply_whole.default(*given)
        return _add_bias(values, None if own is bias else bias).to(dtype)
    left, right = make_signed(a, a_spec), make_signed(b, b_spec)
    if a_run or b_run:
        run = math.gcd(a_run, b_run)
        a_factors = _list_factors(a_scale, a_run, run, a.shape[1])
        b_factors = _list_factors(b_scale, b_run, run, a.shape[1])
        sides = (left, a_factors, a_edge, right, b_factors, b_edge)
        values = torch.ops.qcompiler.multiply_runs.default(*sides, run, kernel)
        return _add_bias(values, bias).to(dtype)
    rows, columns = (*a.shape[:-1], 1), (*b.shape[:-2], 1, b.shape[-1])
    a_point = _stand_along(find_point(a_zero_point, a_spec, math.prod(rows), a_edge), rows)
    b_point = _stand_along(find_point(b_zero_point, b_spec, math.prod(columns), b_edge), columns)
    sums = _subtract_points(multiply(left, right, kernel), left, right, a_point, b_point)
    a_factor = _stand_along(_spread(scales.get_factor(a_scale), math.prod(rows), a_edge), rows)
    b_factor = _stand_along(_spread(scales.get_factor(b_scale), math.prod(columns), b_edge), columns)
    # the smaller one first: neither the product of both scales nor the first step leaves the range of float32 alone
    values = sums.to(torch.float32) * torch.minimum(a_factor, b_factor) * torch.maximum(a_factor, b_factor)
    return _add_bias(values, bias).to(dtype)


def multiply_whole(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    a_spec: str,
    b_spec: str,
    a_edge: int,
    b_edge: int,
    kernel: str,
) -> Tensor:
    """Return `matmul_codes` of two matrices as float32, by a kernel of `WHOLE_KERNELS`.

    Args:
        bias: float32, one value for every column.
    """
    result = fake_multiply_whole(a, a_scale, a_zero_point, b)
    if result.numel():
        left = _describe(a, a_scale, a_zero_point, a_spec, a_edge)
        right = _describe(b, b_scale, b_zero_point, b_spec, b_edge)
        get_whole(kernel)(left, right, None if bias is None else bias.contiguous(), result)
    return result


def fake_multiply_whole(a: Tensor, a_scale: Tensor, a_zero_point: Tensor | None, b: Tensor, *given: object) -> Tensor:
    """Return an empty result."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _describe(codes: Tensor, scale: Tensor, point: Tensor | None, spec: str, edge: int) -> Codes:
    """Return an operand of any type of codes as bytes, which can be shifted."""
    if codes.element_size() > 1:  # as `unpack` returns those of 7 bits at most
        codes = codes.to(torch.int8)
    shifted = codes.dtype is torch.int8 and is_shifted(parse_spec(spec).format)
    return describe_codes(codes, scale, point, edge, is_shifted=shifted)


def describe_codes(
    codes: Tensor,
    scale: Tensor,
    point: Tensor | None,
    edge: int,
    *,
    is_reversed: bool = False,
    is_shifted: bool = False,
) -> Codes:
    """Return codes with dense scales and zero points, for a kernel that scales its sums."""
    point = None if point is None else point.contiguous()
    edge = edge if scale.numel() > 1 else max(1, *codes.shape)  # of codes without elements too
    return Codes(codes, scale.contiguous(), point, edge, is_reversed, is_shifted)


def fake_matmul_codes(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    a_spec: str,
    b_spec: str,
    a_edge: int,
    b_edge: int,
    kernel: str,
    dtype: torch.dtype,
    a_run: int = 0,
    b_run: int = 0,
) -> Tensor:
    """Return an empty result."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)


def explain_product(facts: Facts, dtype: torch.dtype) -> str:
    """Return an empty string, or the reason why codes cannot be multiplied as integers on any device."""
    for form in facts.formats:
        if not isinstance(form, IntFormat) or form.bits > 8:
            return f"{form} is no integer of at most 8 bits"
    if dtype not in DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}, and sums are scaled in float32"
    return ""


def make_signed(codes: Tensor, spec: str) -> Tensor:
    """Return codes as int8; those of 0 … 255 less 128, unless they are so already."""
    if codes.dtype is torch.int8 or not is_shifted(parse_spec(spec).format):
        return codes.to(torch.int8)
    return (codes.to(torch.int32) - 128).to(torch.int8)


def find_point(point: Tensor | None, spec: str, extent: int, edge: int) -> Tensor | int | None:
    """Return the int8 code of zero, as int32 [extent] or [1]; None: it is 0."""
    shift = 128 if is_shifted(parse_spec(spec).format) else 0
    if point is None:
        return -shift or None
    return _spread(point.to(torch.int32), extent, edge) - shift


def _list_factors(scale: Tensor, own_run: int, run: int, length: int) -> Tensor:
    """Return the factor of every block and run: [blocks, runs of the tensor] → [blocks, runs that both tensors have].

    Args:
        own_run: of this tensor, a multiple of `run`; 0: one value for the sum.
    """
    own_count, count = -(-length // own_run) if own_run else 1, -(-length // run)
    factors = scales.get_factor(scale).reshape(-1, own_count)
    shape = (factors.shape[0], count)
    return BlockView(shape, shape, (1, own_run // run if own_run else count)).spread(factors)


def _add_bias(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias.to(torch.float32)


def _subtract_points(
    sums: Tensor, a: Tensor, b: Tensor, a_point: Tensor | int | None, b_point: Tensor | int | None
) -> Tensor:
    """Return Σ(a − p)(b − q) = Σab − p·Σb − q·Σa + length·p·q. Terms of int32 can wrap around, the result does not."""
    a_point, b_point = (one.to(sums.dtype) if isinstance(one, Tensor) else one for one in (a_point, b_point))
    if a_point is not None:
        sums = sums - a_point * b.sum(-2, keepdim=True, dtype=sums.dtype)
    if b_point is not None:
        sums = sums - b_point * a.sum(-1, keepdim=True, dtype=sums.dtype)
    if a_point is not None and b_point is not None:
        sums = sums + a.shape[-1] * a_point * b_point
    return sums


def _stand_along(values: _Point, shape: tuple[int, ...]) -> _Point:
    """Return values of every row or column in a shape that meets the sums; one value stays alone."""
    return values.reshape(shape) if isinstance(values, Tensor) and values.numel() > 1 else values


def _spread(values: Tensor, extent: int, edge: int) -> Tensor:
    """Return one value for each of `extent` rows; a single one if they share it."""
    if edge >= extent:
        return values.reshape(1)
    return BlockView((extent,), (extent,), (edge,)).spread(values.reshape(-1))
