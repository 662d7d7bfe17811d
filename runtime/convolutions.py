"""Convolutions of codes whose kernel reads the image itself; the references multiply patches of the image."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qcompiler.runtime import scales
from qcompiler.runtime.kernels.convolutions import order_image
from qcompiler.runtime.kernels.kernel import Codes, Windows
from qcompiler.runtime.kernels.table import get_convolution
from qcompiler.runtime.numbers.blocks import BlockView
from qcompiler.runtime.patches import list_rests, patches, turn_taps
from qcompiler.runtime.products import describe_codes, matmul_codes


@dataclasses.dataclass(slots=True)  # not frozen: that takes 0.4 µs longer
class _Operand:
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: str
    edge: int
    run: int

    def __post_init__(self) -> None:
        if self.codes.element_size() > 1:  # as `unpack` returns those of 7 bits at most
            self.codes = self.codes.to(torch.int8)

    def cut(self, dim: int, first: int, run: int) -> "_Operand":
        """Return some indices of the summed dimension, throughout which no scale changes."""
        extent = self.codes.shape[dim]
        codes = self.codes.narrow(dim, first, min(run, extent - first))
        if not self.run:
            return dataclasses.replace(self, codes=codes)
        scale = self.scale.reshape(-1, -(-extent // self.run))[:, first // self.run]
        return dataclasses.replace(self, codes=codes, scale=scale, run=0)

    def drop_runs(self) -> "_Operand":
        """Return an operand without elements, and so without runs, that one scale belongs to."""
        edge, one = max(1, *self.codes.shape), self.codes.new_ones(1, dtype=torch.float32)
        return dataclasses.replace(self, scale=one, edge=edge, run=0)

    def describe(self, codes: Tensor, *, is_reversed: bool = False) -> Codes:
        """Return codes with dense scales and zero points, for a kernel."""
        return describe_codes(codes, self.scale, self.zero_point, self.edge, is_reversed=is_reversed)

    def describe_image(self) -> Codes:
        """Return the codes of an image, whose channels or whose last dimension lie side by side."""
        is_dense = 1 in (self.codes.stride(1), self.codes.stride(-1))
        return self.describe(self.codes if is_dense else self.codes.contiguous())

    def spread_scale(self, extent: int, times: int) -> tuple[Tensor, int]:
        """Return the scales of `times` · extent columns, the extent innermost, and how many columns share one."""
        if self.scale.numel() == 1:
            return self.scale.reshape(1), times * extent
        return BlockView((extent,), (extent,), (self.edge,)).spread(self.scale.reshape(-1)).repeat(times), 1


def convolve_codes(
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
    start: Sequence[int],
    count: Sequence[int],
    step: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    a_run: int = 0,
    b_run: int = 0,
) -> Tensor:
    """Return [samples, columns, *count]: `matmul_codes` of the patches of `a` and of `b`.

    With runs every run of channels is a convolution of its own. The results are added in float32 in ascending order,
    then the bias.

    Args:
        a: codes [samples, channels, *space]; `patches` says what `start` to `dilation` read of them, with the
            taps of `b`.
        a_edge: samples that share a scale.
        b: codes [columns, channels, *taps].
        b_edge: columns that share a scale.
        bias: one value for every column.
        kernel: the name of a kernel of convolutions (runtime/kernels/table.py); empty: the reference.
        channels_last: whether columns are the innermost dimension in memory.
        a_run: channels that share a scale, without zero points; `a_scale` then has a row of values for every block of
            samples. 0: all of them.
        b_run: that of `b`.
    """
    windows = (start, count, step, b.shape[2:], dilation)
    left = _Operand(a, a_scale, a_zero_point, a_spec, a_edge, a_run)
    right = _Operand(b, b_scale, b_zero_point, b_spec, b_edge, b_run)
    runs = _list_runs(left, right, (1, 1))
    result = _make_result(a, (a.shape[0], b.shape[0], *count), _choose_type(dtype, kernel, runs), channels_last)
    for x, w, is_first, is_last in runs:
        _convolve(x, w, bias if is_last else None, kernel, windows, result, is_first)
    return result if result.dtype is dtype else result.to(dtype)


#: both operands of a run, and whether the run is the first and the last
_Run: TypeAlias = tuple[_Operand, _Operand, bool, bool]


def _choose_type(dtype: torch.dtype, kernel: str, runs: list[_Run]) -> torch.dtype:
    """Return the type in which results are written: float32 if the results of runs are added, or are cast."""
    return dtype if kernel and dtype is torch.bfloat16 and len(runs) == 1 else torch.float32


def _list_runs(a: _Operand, b: _Operand, dims: tuple[int, int]) -> list[_Run]:
    """Return both operands run by run; `dims` are summed."""
    run, extent = math.gcd(a.run, b.run), a.codes.shape[dims[0]]
    if not run:
        return [(a, b, True, True)]
    if not extent:
        return [(a.drop_runs(), b.drop_runs(), True, True)]
    return [
        (a.cut(dims[0], first, run), b.cut(dims[1], first, run), first == 0, first + run >= extent)
        for first in range(0, extent, run)
    ]


def _convolve(
    a: _Operand, b: _Operand, bias: Tensor | None, kernel: str, windows: Windows, result: Tensor, is_first: bool
) -> None:
    """Write [samples, columns, *count] of operands without runs, or add it; then the bias."""
    samples, columns, count = a.codes.shape[0], b.codes.shape[0], windows[1]
    if kernel and a.codes.numel() * b.codes.numel() * math.prod(count):
        sides = a.describe_image(), b.describe(order_image(b.codes))
        get_convolution(kernel)(*sides, _make_dense(bias, columns), windows, result, is_first)
        return
    rows = patches(a.codes, a.zero_point, a.spec, a.edge, *windows)
    matrix = b.codes.movedim(1, -1).reshape(columns, -1).t()
    given = (rows, a.scale, a.zero_point, matrix, b.scale, b.zero_point, None, a.spec, b.spec)
    values = matmul_codes(*given, a.edge * math.prod(count), b.edge, "", torch.float32)
    _write(result, values.reshape(samples, *count, columns).movedim(-1, 1), is_first)
    if bias is not None:
        result.add_(bias.reshape(-1, *(1,) * len(count)))


def _write(result: Tensor, values: Tensor, is_first: bool) -> None:
    """Write the values of a run, or add them."""
    if is_first:
        result.copy_(values)
    else:
        result.add_(values)


def fake_convolve_codes(a: Tensor, *given: object) -> Tensor:
    """Return an empty result."""
    b, dtype, count, channels_last = given[2], given[11], given[13], given[16]
    assert isinstance(b, Tensor)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(count, Sequence)
    return _make_result(a, (a.shape[0], b.shape[0], *count), dtype, bool(channels_last))


def convolve_input(
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    space: Sequence[int],
    channels_last: bool,
    a_run: int = 0,
    b_run: int = 0,
) -> Tensor:
    """Return [samples, channels, *space], the gradient of the input of a convolution.

    Input y meets output o at tap i if y + padding = stride·o + dilation·i. So the inputs whose y + padding have the
    same remainder by the stride are a convolution of the output gradient with every stride-th tap, in reverse. The
    reference is `matmul_codes` of patches and of `turn_taps`, where zeros fill up the taps. Runs of rows are added as
    in `convolve_codes`.

    Args:
        a: codes [samples, rows, *positions] of the output gradient.
        a_edge: samples that share a scale.
        b: codes [rows, channels, *taps] of the weight; without a zero point if the stride is above 1.
        b_edge: channels that share a scale.
        bias: None, as gradients have none.
        kernel: the name of a kernel of convolutions (runtime/kernels/table.py); empty: the reference.
        stride: of the convolution, for each dimension of space; above 1 only with a dilation of 1.
        space: inputs.
        channels_last: whether channels are the innermost dimension in memory.
        a_run: rows that share a scale; 0: all of them.
        b_run: that of `b`.
    """
    geometry = stride, padding, dilation, space
    left = _Operand(a, a_scale, a_zero_point, a_spec, a_edge, a_run)
    right = _Operand(b, b_scale, b_zero_point, b_spec, b_edge, b_run)
    runs = _list_runs(left, right, (1, 0))
    result = _make_result(a, (a.shape[0], b.shape[1], *space), _choose_type(dtype, kernel, runs), channels_last)
    for y, w, is_first, _ in runs:
        _convolve_input(y, w, kernel, geometry, result, is_first)
    return result if result.dtype is dtype else result.to(dtype)


def _convolve_input(a: _Operand, b: _Operand, kernel: str, geometry: Windows, result: Tensor, is_first: bool) -> None:
    """Write [samples, channels, *space] of operands without runs, or add it."""
    stride, padding, dilation, space = geometry
    if not kernel or not a.codes.numel() * b.codes.numel() * math.prod(space):
        _write(result, _multiply_turned(a, b, geometry), is_first)
        return
    left, weight = a.describe_image(), order_image(b.codes)
    taps = weight.shape[2:]
    rests = list_rests(tuple(taps), tuple(stride), tuple(padding), tuple(dilation))
    zeros = _scale_zeros(a, b, result) if any(rest.is_empty for rest in rests) else None
    if zeros is not None and is_first:
        result.copy_(zeros)  # one pass takes half as long as three for the inputs that no tap meets
    for rest in rests:
        part = _take_every(result, rest.place, stride)
        if part.numel() and not rest.is_empty:
            right = b.describe(_take_every(weight, rest.remainder, stride).transpose(0, 1), is_reversed=True)
            windows = rest.start, part.shape[2:], (1,) * len(taps), rest.taps, dilation
            get_convolution(kernel)(left, right, None, windows, part, is_first)
        elif zeros is not None and not is_first:
            part.add_(zeros)


def _multiply_turned(a: _Operand, b: _Operand, geometry: Windows) -> Tensor:
    """Return the input gradient as a product of patches: a position holds the gradients of `stride` inputs."""
    stride, padding, dilation, space = geometry
    samples, channels, dims = len(a.codes), b.codes.shape[1], len(space)
    first = [p // s for p, s in zip(padding, stride, strict=True)]
    turned = [-(-k // s) for k, s in zip(b.codes.shape[2:], stride, strict=True)]
    count = [(p + n - 1) // s - t + 1 for p, n, s, t in zip(padding, space, stride, first, strict=True)]
    start = [t - d * (u - 1) for t, d, u in zip(first, dilation, turned, strict=True)]
    rows = patches(a.codes, a.zero_point, a.spec, a.edge, start, count, [1] * dims, turned, dilation)
    scale, edge = b.spread_scale(channels, math.prod(stride))
    given = (turn_taps(b.codes, stride), scale, b.zero_point, None, a.spec, b.spec)
    values = matmul_codes(rows, a.scale, a.zero_point, *given, a.edge * math.prod(count), edge, "", torch.float32)
    pairs = (place for dim in range(dims) for place in (1 + dim, 1 + dims + dim))
    whole = [n * s for n, s in zip(count, stride, strict=True)]
    values = values.reshape(samples, *count, *stride, channels).permute(0, 1 + 2 * dims, *pairs)
    border = [p - s * t for p, s, t in zip(padding, stride, first, strict=True)]
    inside = (slice(low, low + extent) for low, extent in zip(border, space, strict=True))
    return values.reshape(samples, channels, *whole)[(slice(None), slice(None), *inside)]


def _take_every(x: Tensor, first: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return every stride-th element of each dimension of space."""
    if max(stride) == 1:
        return x
    return x[(slice(None), slice(None), *(slice(i, None, s) for i, s in zip(first, stride, strict=True)))]


def _scale_zeros(a: _Operand, b: _Operand, like: Tensor) -> Tensor:
    """Return sums of no products, which are NaN where a scale is: [samples, channels, 1, …]."""
    samples, channels = like.shape[:2]
    own, other = (scales.get_factor(one.spread_scale(n, 1)[0]) for one, n in ((a, samples), (b, channels)))
    return (own[:, None] * 0 + other * 0).reshape(len(own), len(other), *(1,) * (like.ndim - 2))


def fake_convolve_input(a: Tensor, *given: object) -> Tensor:
    """Return an empty result."""
    b, dtype, space, channels_last = given[2], given[11], given[15], given[16]
    assert isinstance(b, Tensor)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(space, Sequence)
    return _make_result(a, (a.shape[0], b.shape[1], *space), dtype, bool(channels_last))


def convolve_gradient(
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
    start: Sequence[int],
    count: Sequence[int],
    step: Sequence[int],
    taps: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    a_run: int = 0,
    b_run: int = 0,
) -> Tensor:
    """Return [rows, channels, *taps]: `matmul_codes` of `a`, turned, and of the patches of `b`.

    Runs of samples are added as in `convolve_codes`.

    Args:
        a: codes [samples, rows, *count].
        a_edge: rows that share a scale.
        b: codes [samples, channels, *space]; `patches` says what `start` to `dilation` read of them. A zero point is
            one value.
        bias: None, as gradients have none.
        b_edge: channels that share a scale.
        kernel: the name of a kernel of convolutions (runtime/kernels/table.py); empty: the reference.
        channels_last: whether channels are the innermost dimension in memory.
        a_run: samples that share a scale; 0: all of them.
        b_run: that of `b`.
    """
    windows = (start, count, step, taps, dilation)
    left = _Operand(a, a_scale, a_zero_point, a_spec, a_edge, a_run)
    right = _Operand(b, b_scale, b_zero_point, b_spec, b_edge, b_run)
    result = _make_result(a, (a.shape[1], b.shape[1], *taps), torch.float32, channels_last)
    for y, x, is_first, _ in _list_runs(left, right, (0, 0)):
        _convolve_gradient(y, x, kernel, windows, result, is_first)
    return result if result.dtype is dtype else result.to(dtype)


def _convolve_gradient(a: _Operand, b: _Operand, kernel: str, windows: Windows, result: Tensor, is_first: bool) -> None:
    """Write [rows, channels, *taps] of operands without runs, or add it."""
    rows, channels, taps = a.codes.shape[1], b.codes.shape[1], windows[3]
    if kernel and a.codes.numel() * b.codes.numel() * math.prod(taps):
        get_convolution(kernel)(a.describe_image(), b.describe_image(), None, windows, result, is_first)
        return
    matrix = a.codes.movedim(1, -1).reshape(-1, rows).t()
    columns = patches(b.codes, b.zero_point, b.spec, len(b.codes), *windows)
    scale, edge = b.spread_scale(channels, math.prod(taps))
    given = (columns, scale, b.zero_point, None, a.spec, b.spec)
    values = matmul_codes(matrix, a.scale, a.zero_point, *given, a.edge, edge, "", torch.float32)
    _write(result, values.reshape(rows, *taps, channels).movedim(-1, 1), is_first)


def fake_convolve_gradient(a: Tensor, *given: object) -> Tensor:
    """Return an empty result."""
    b, dtype, taps, channels_last = given[2], given[11], given[15], given[17]
    assert isinstance(b, Tensor)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(taps, Sequence)
    return _make_result(a, (a.shape[1], b.shape[1], *taps), dtype, bool(channels_last))


def _make_result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return an empty [first, second, *others], in memory as it is or with the second dimension innermost."""
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    return like.new_empty_strided(shape, _find_stride(shape), dtype=dtype)


@functools.lru_cache(maxsize=4096)
def _find_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return dense strides of [first, second, *others] whose second dimension is the innermost."""
    _, second, *others = shape
    behind = [second * math.prod(others[dim + 1 :]) for dim in range(len(others))]
    return (second * math.prod(others), 1, *behind)


def _make_dense(bias: Tensor | None, columns: int) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32).expand(columns).contiguous()
