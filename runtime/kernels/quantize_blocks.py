"""Calls of quantize_blocks.cpp: codes, scales and floats of a dense tensor, in one pass through memory."""

import ctypes
import dataclasses
import functools
import math
import zlib
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import get_pointer
from qcompiler.runtime.kernels.loader import load_library
from qcompiler.runtime.kernels.memory import Axis, list_axes, order_scales
from qcompiler.runtime.kernels.recorder import call_kernel
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.packing import packed_dim, per_byte
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.scales import mantissa_of
from qcompiler.runtime.spec import QuantSpec, Scale, parse_spec

NAME: Final = "quantize_blocks"
#: type of a device → types of the floats that its kernels read and write
DTYPES: Final = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32,)}
#: as in the C++
_MOST_AXES: Final = 8
#: the bits of infinity; those of NaN are above
_INFINITY: Final = 0x7F800000


class _Axis(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("extent", "edge", "scale", "logical"))


class Task(ctypes.Structure):
    """What a kernel is told of a call, in C++ and in Triton."""

    _fields_ = (
        ("axes", ctypes.c_int64),
        ("axis", _Axis * _MOST_AXES),
        ("lowest", ctypes.c_float),
        ("largest", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("magnitude_bits", "up", "down", "low", "high")),
        ("reach", ctypes.c_float),
        ("site", ctypes.c_uint32),
        ("limit", ctypes.c_uint32),
    )

    def list_axes(self) -> tuple[Axis, ...]:
        """Return the axes in the order of memory, the outermost first."""
        return tuple(Axis(one.extent, one.edge, one.scale, one.logical) for one in self.axis[: self.axes])


class Reals(ctypes.Structure):
    """A tensor of float32 or bfloat16."""

    _fields_ = (("data", ctypes.c_void_p), ("is_short", ctypes.c_bool))


class _Data(ctypes.Structure):
    _fields_ = (
        *((name, Reals) for name in ("x", "floats")),
        *((name, ctypes.c_void_p) for name in ("codes_read", "codes", "scale", "zero_point", "key")),
        ("threads", ctypes.c_int64),
        ("parts", ctypes.c_int64),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A tensor, and what becomes of it: everything of a call that is known before the data.

    `find_call` returns one object for equal calls. What follows from a call is found by that object, in 0.1 µs; to
    compare the parts of two calls takes 2 µs, three times a call.
    """

    shape: tuple[int, ...]
    #: of a dense tensor
    stride: tuple[int, ...]
    spec: str
    layout: str
    site: str = ""
    #: floats are NaN also where the tensor is not finite
    shows: bool = False


@functools.lru_cache(maxsize=4096)
def find_call(
    shape: tuple[int, ...], stride: tuple[int, ...], spec: str, layout: str, site: str = "", shows: bool = False
) -> Call:
    """Return a call (arguments: its fields)."""
    return Call(shape, stride, spec, layout, site, shows)


class Results(NamedTuple):
    """The tensors that a call reads and writes; None: not wanted, or not there."""

    scale: Tensor
    codes: Tensor | None = None
    floats: Tensor | None = None
    #: codes in a byte of `codes`, as `pack` writes them
    parts: int = 1


@functools.lru_cache(maxsize=4096)
def find_types(spec: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the types of codes and of scales."""
    parsed = parse_spec(spec)
    return parsed.format.dtype, parsed.scale.dtype


@functools.lru_cache(maxsize=4096)
def find_scale_stride(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of the scales that a kernel finds: in the order of the blocks in memory."""
    view = view_blocks(call.shape, call.layout, parse_spec(call.spec).block)
    return view.counts, order_scales(view, call.layout, call.stride)


def explain_order(call: Call) -> str:
    """Say why a tensor cannot be walked through in the order of memory; empty: it can."""
    task = make_task(call, find_scale_stride(call)[1], finds_scale=True)
    return task if isinstance(task, str) else ""


@functools.lru_cache(maxsize=4096)
def explain_parts(call: Call, *, finds_scale: bool = True) -> str:
    """Say why a kernel cannot pack the codes that it writes, or unpack those that it reads; empty: it can.

    Codes that share a byte lie a part of the tensor apart, and the kernel works on a tile of each part in turn. No
    block may reach from part to part.
    """
    bits = parse_spec(call.spec).format.bits
    dim, parts = packed_dim(call.shape, bits), per_byte(bits)
    if dim is None or call.shape[dim] * call.stride[dim] != math.prod(call.shape):
        return f"codes that share a byte are not {parts} equal parts of memory"
    task = make_task(call, find_scale_stride(call)[1], finds_scale=finds_scale)
    if isinstance(task, str):
        return task
    outermost = task.list_axes()[0]
    if outermost.extent % (parts * outermost.edge):
        return f"blocks of {outermost.edge} along {outermost.extent} elements reach from part to part of {parts}"
    return ""


def quantize(call: Call, x: Tensor, results: Results, key: Tensor | None, zero: Tensor | None, *, finds: bool) -> str:
    """Write codes and floats of a dense float tensor (`DTYPES`), and the scales if the kernel finds them.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    prepared = prepare(call, results.scale, NAME, finds_scale=finds)
    if isinstance(prepared, str):
        return prepared
    task, library = prepared
    data = _Data(parts=results.parts, threads=torch.get_num_threads())
    point_to_reals(data.x, x)
    point_to_reals(data.floats, results.floats)
    data.codes, data.scale = get_pointer(results.codes), results.scale.data_ptr()
    data.key, data.zero_point = get_pointer(key), get_pointer(zero)
    call_kernel(library.quantize_blocks, task, data, results.scale.is_floating_point(), finds)
    return ""


def dequantize(call: Call, codes: Tensor, scale: Tensor, zero: Tensor | None, floats: Tensor, *, parts: int = 1) -> str:
    """Write the floats of dense codes; return the reason why nothing is done, or an empty string.

    Args:
        parts: codes in a byte, as `pack` writes them.
    """
    reason = explain_parts(call, finds_scale=False) if parts > 1 else ""
    if reason:
        return reason
    prepared = prepare(call, scale, NAME, finds_scale=False)
    if isinstance(prepared, str):
        return prepared
    task, library = prepared
    data = _Data(parts=parts, threads=torch.get_num_threads())
    point_to_reals(data.floats, floats)
    data.codes_read, data.scale, data.zero_point = codes.data_ptr(), scale.data_ptr(), get_pointer(zero)
    is_signed = parse_spec(call.spec).format.dtype is torch.int8
    call_kernel(library.dequantize_blocks, task, data, scale.is_floating_point(), is_signed)
    return ""


def prepare(call: Call, scale: Tensor, name: str, *, finds_scale: bool) -> tuple[Task, ctypes.CDLL] | str:
    """Return what the C++ is told, and the library of a name, or the reason why there is no call."""
    task, library = make_task(call, scale.stride(), finds_scale=finds_scale), _find_library(name)
    if isinstance(task, str):
        return task
    return library if isinstance(library, str) else (task, library)


@functools.cache
def _find_library(name: str) -> ctypes.CDLL | str:
    """Return a library, or the reason why there is none, without the lock of `load_library`."""
    return load_library(name)


def point_to_reals(reals: Reals, tensor: Tensor | None) -> None:
    """Write the address of a tensor as kernels know it; None: there is none."""
    if tensor is not None:
        reals.data, reals.is_short = tensor.data_ptr(), tensor.dtype is torch.bfloat16


@functools.lru_cache(maxsize=4096)
def make_task(call: Call, scale_stride: tuple[int, ...], *, finds_scale: bool) -> Task | str:
    """Return what a kernel is told of a call, or the reason why it cannot walk through the tensor."""
    spec = parse_spec(call.spec)
    view = view_blocks(call.shape, call.layout, spec.block)
    axes = list_axes(view, call.layout, call.stride, scale_stride, whole_blocks=finds_scale)
    if axes is None:
        return f"dimensions of one axis of {call.layout} lie apart in memory"
    if len(axes) > _MOST_AXES:
        return f"{len(axes)} axes in memory; valid: at most {_MOST_AXES}"
    task = Task(
        axes=len(axes),
        lowest=spec.format.lowest,
        largest=spec.format.largest,
        reach=spec.format.reach,
        site=zlib.crc32(call.site.encode()) if spec.rounding is Rounding.STOCHASTIC else 0,
        limit=_INFINITY if call.shows else 2**32 - 1,
        **_find_exponent_rule(spec),
    )
    for place, axis in enumerate(axes):
        task.axis[place] = _Axis(*dataclasses.astuple(axis))
    return task


def _find_exponent_rule(spec: QuantSpec) -> dict[str, int]:
    """Return the numbers of `power_of_two` (runtime/scales.py): the mantissas beyond which the exponent moves."""
    never = {"up": 1 << 24, "down": -1}
    moved = {
        Scale.FIT: {"up": mantissa_of(spec.format.reach)},
        Scale.CEIL: {"down": 0},
        Scale.ROUND: {"down": mantissa_of(math.sqrt(2))},
    }
    ends = {"low": 127, "high": 127} if spec.scale is Scale.ONE else {"low": 1, "high": 254}
    return {"magnitude_bits": spec.format.magnitude_bits, **never, **moved.get(spec.scale, {}), **ends}
