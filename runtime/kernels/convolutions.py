"""Calls of convolve.cpp and convolve_gradient.cpp: convolutions of codes that copy no patches."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import Values, get_pointer, point_to_scale, point_to_zero, run_call
from qcompiler.runtime.kernels.kernel import Codes, Facts, Kernel, Windows, weigh_products
from qcompiler.runtime.kernels.loader import explain_vectors, has_wide_vectors, load_library
from qcompiler.runtime.kernels.recorder import call_kernel
from qcompiler.runtime.numbers.formats import Kind

#: the files in C++
LIBRARIES: Final = ("convolve", "convolve_gradient")
#: with AVX2, and with AVX-512 VNNI: 16·16 positions, 8 → 16 channels, 3×3 take 30 µs, as in float; four times as many
#: 35 µs, and 43 in float. With AVX2 4 samples take 249 µs, in float 221; 16 of them 380 and 397
LEAST_PRODUCTS: Final = (2**22, 2**19)
#: 2^31 / 255: int32 holds the sum of the codes of a row
MOST_POSITIONS: Final = 2**23
#: dimensions of space that the kernels know; the first ones have one element where an image has fewer
_DIMS: Final = 3
_SIZES: Final = ctypes.c_int64 * _DIMS
#: between codes of −128 … 127 and bytes of 0 … 255
_SHIFT: Final = 128


class _Image(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("samples", "channels")),
        ("space", _SIZES),
        ("stride", ctypes.c_int64 * (2 + _DIMS)),
        ("flip", ctypes.c_int64),
    )


class _Windows(ctypes.Structure):
    _fields_ = tuple((name, _SIZES) for name in ("start", "count", "step", "taps", "dilation"))


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "rows", "step", "row_step")),
        ("tap_step", _SIZES),
    )


class _Forward(ctypes.Structure):
    _fields_ = (
        ("x", _Image),
        ("windows", _Windows),
        ("w", _Weight),
        *((name, Values) for name in ("x_scale", "x_point", "w_scale")),
        ("bias", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * (2 + _DIMS)),
        *((name, ctypes.c_int64) for name in ("is_added", "size", "threads")),
        *((name, ctypes.c_void_p) for name in ("scratch", "y")),
    )


class _Gradient(ctypes.Structure):
    _fields_ = (
        *((name, _Image) for name in ("a", "x")),
        ("windows", _Windows),
        *((name, Values) for name in ("a_scale", "a_point", "x_scale", "x_point")),
        *((name, ctypes.c_int64) for name in ("is_channels_last", "is_added", "threads")),
        *((name, ctypes.c_void_p) for name in ("scratch", "result")),
    )


def _explain_forward(facts: Facts) -> str:
    """Say why the kernel cannot convolve codes; empty: it can."""
    if facts.formats[1].kind is not Kind.SIGNED:
        return f"the kernel of convolutions takes signed weights, got {facts.formats[1]}"
    return explain_vectors()


def _explain_gradient(facts: Facts) -> str:
    """Say why the kernel cannot compute a weight gradient; empty: it can."""
    if facts.length > MOST_POSITIONS:
        return f"the kernel of weight gradients takes {MOST_POSITIONS} positions at most, got {facts.length}"
    return explain_vectors()


def _weigh(facts: Facts) -> str:
    """Say why the float kernel is faster; empty: it is not."""
    return weigh_products(facts, LEAST_PRODUCTS[has_wide_vectors()], by_run=True)


@functools.cache
def load_forward() -> ctypes.CDLL | str:
    """Return the library of convolutions, or the reason why this processor has none."""
    library = _load(LIBRARIES[0], _Forward)
    if isinstance(library, ctypes.CDLL):
        library.copy_image.argtypes = (ctypes.POINTER(_Image), ctypes.c_int64, ctypes.c_void_p)
    return library


@functools.cache
def load_gradient() -> ctypes.CDLL | str:
    """Return the library of weight gradients, or the reason why this processor has none."""
    return _load(LIBRARIES[1], _Gradient)


def _load(name: str, call: type[ctypes.Structure]) -> ctypes.CDLL | str:
    library = explain_vectors() or load_library(name)
    if isinstance(library, str):
        return library
    getattr(library, name).argtypes = library.count_scratch.argtypes = (ctypes.POINTER(call),)
    library.count_scratch.restype = ctypes.c_int64
    return library


def _convolve(a: Codes, b: Codes, bias: Tensor | None, windows: Windows, result: Tensor, is_first: bool) -> None:
    """Write or add [samples, columns, *count], in any memory order (arguments: `convolve_codes`)."""
    call = _Forward(
        x=_point_to_image(a.codes, flip=torch.int8),
        windows=_lay_out_windows(*windows),
        w=_point_to_weight(b),
        x_scale=point_to_scale(a),
        x_point=point_to_zero(a),
        w_scale=point_to_scale(b),
        bias=get_pointer(bias),
        stride=_spread_strides(result.stride()),
        is_added=not is_first,
        size=result.element_size(),
        y=result.data_ptr(),
    )
    run_call(load_forward(), LIBRARIES[0], call, result)


def _convolve_gradient(
    a: Codes, b: Codes, bias: Tensor | None, windows: Windows, result: Tensor, is_first: bool
) -> None:
    """Write or add a dense [rows, channels, *taps] (arguments: `convolve_gradient`)."""
    call = _Gradient(
        a=_point_to_image(a.codes, flip=torch.int8),
        x=_point_to_image(b.codes, flip=torch.uint8),
        windows=_lay_out_windows(*windows),
        a_scale=point_to_scale(a),
        a_point=point_to_zero(a),
        x_scale=point_to_scale(b),
        x_point=point_to_zero(b),
        is_channels_last=result.stride(1) == 1,
        is_added=not is_first,
        result=result.data_ptr(),
    )
    run_call(load_gradient(), LIBRARIES[1], call, result)


def order_image(codes: Tensor) -> Tensor:
    """Return codes [first, second, *others] with the second dimension innermost: by the kernel, torch takes long."""
    if codes.stride(1) == 1 or codes.stride(-1) != 1:
        return codes
    library = load_forward()
    if isinstance(library, str):
        return codes
    made = codes.new_empty((codes.shape[0], *codes.shape[2:], codes.shape[1]))
    image = _point_to_image(codes, flip=None)
    call_kernel(library.copy_image, image, torch.get_num_threads(), ctypes.c_void_p(made.data_ptr()))
    return made.movedim(-1, 1)


def _point_to_image(codes: Tensor, *, flip: torch.dtype | None) -> _Image:
    """Return an image, whose bytes are turned between signed and unsigned ones if they are of type `flip`."""
    space = (*(1,) * (2 + _DIMS - codes.ndim), *codes.shape[2:])
    shift = _SHIFT * (codes.dtype is flip)
    return _Image(codes.data_ptr(), *codes.shape[:2], space, _spread_strides(codes.stride()), shift)


def _spread_strides(stride: Sequence[int]) -> tuple[int, ...]:
    """Return strides of samples, channels and all dimensions of space that the kernels know."""
    return (*stride[:2], *(0,) * (2 + _DIMS - len(stride)), *stride[2:])


def _point_to_weight(side: Codes) -> _Weight:
    """Return a weight from its first tap on."""
    (columns, rows, *taps), (step, row_step, *tap_step) = side.codes.shape, side.codes.stride()
    first = side.codes.data_ptr()
    if side.is_reversed:
        first += sum((k - 1) * s for k, s in zip(taps, tap_step, strict=True))
        tap_step = [-s for s in tap_step]
    return _Weight(first, columns, rows, step, row_step, (*(0,) * (_DIMS - len(taps)), *tap_step))


def _lay_out_windows(start: Sequence[int], *others: Sequence[int]) -> _Windows:
    missing = _DIMS - len(start)
    return _Windows((*(0,) * missing, *start), *((*(1,) * missing, *numbers) for numbers in others))


CONVOLVE: Final = Kernel("convolve", "cpu", _explain_forward, _weigh, _convolve, image="left")
CONVOLVE_GRADIENT: Final = Kernel(
    "convolve-gradient", "cpu", _explain_gradient, _weigh, _convolve_gradient, image="right", has_wide_sums=True
)
