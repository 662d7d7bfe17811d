"""Calls of quantize_whole.cpp: codes and floats of a dense tensor with one scale, which is known or found, or a few."""

import ctypes
import dataclasses
import functools
import math
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.calls import get_pointer
from qcompiler.runtime.kernels.quantize_blocks import (
    Call,
    Reals,
    Results,
    find_scale_stride,
    make_task,
    point_to_reals,
    prepare,
)
from qcompiler.runtime.kernels.recorder import call_kernel
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.spec import parse_spec

NAME: Final = "quantize_whole"
#: elements of a block that stay in the cache between the search for the largest and the rounding: 256 kB of floats
MOST_IN_CACHE: Final = 2**16
#: as in the C++
_KINDS: Final = {Kind.SIGNED: 0, Kind.UNSIGNED: 1, Kind.AFFINE: 2}


class _Data(ctypes.Structure):
    _fields_ = (
        *((name, Reals) for name in ("x", "floats")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point", "key")),
        *((name, ctypes.c_int64) for name in ("threads", "kind")),
        *((name, ctypes.c_void_p) for name in ("reach", "measured", "checked")),
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a range learns from a tensor, and what of the range it is compared with."""

    #: float32, the smallest and the largest value that is not clipped
    reach: Tensor
    #: float32, the ends of the range of the tensor, and the fraction of all elements that is clipped
    measured: Tensor
    #: the scale, NaN (255) if the tensor is not finite
    checked: Tensor


@functools.lru_cache(maxsize=4096)
def finds_scales(call: Call) -> bool:
    """Return True if `quantize` takes a tensor: one block, or large blocks that follow each other in memory."""
    view = view_blocks(call.shape, call.layout, parse_spec(call.spec).block)
    if (count := math.prod(view.counts)) < 2:
        return count == 1  # an empty tensor can have no block
    task = make_task(call, find_scale_stride(call)[1], finds_scale=False)
    follows = not isinstance(task, str) and not any(axis.scale for axis in task.list_axes()[1:])
    return follows and math.prod(view.edges) > MOST_IN_CACHE


def quantize(call: Call, x: Tensor, results: Results, key: Tensor | None) -> str:
    """Write scales, codes and floats of a dense tensor (`DTYPES`), in two passes over each block (`finds_scales`).

    Returns:
        The reason why nothing is done; empty: it is.
    """
    return _call_kernel("quantize_whole", call, x, results, key)


def quantize_measured(
    call: Call, x: Tensor, results: Results, key: Tensor | None, zero: Tensor | None, measured: Measured
) -> str:
    """Write codes and floats of a dense tensor (`DTYPES`) by a scale that is known, and what the range learns.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    return _call_kernel("quantize_measured", call, x, results, key, zero, measured)


def _call_kernel(
    name: str,
    call: Call,
    x: Tensor,
    results: Results,
    key: Tensor | None,
    zero: Tensor | None = None,
    measured: Measured | None = None,
) -> str:
    prepared = prepare(call, results.scale, NAME, finds_scale=False)
    if isinstance(prepared, str):
        return prepared
    task, library = prepared
    data = _Data(threads=torch.get_num_threads(), kind=_KINDS[parse_spec(call.spec).format.kind])
    point_to_reals(data.x, x)
    point_to_reals(data.floats, results.floats)
    data.codes, data.scale = get_pointer(results.codes), results.scale.data_ptr()
    data.key, data.zero_point = get_pointer(key), get_pointer(zero)
    if measured is not None:
        data.reach, data.measured = measured.reach.data_ptr(), measured.measured.data_ptr()
        data.checked = measured.checked.data_ptr()
    call_kernel(getattr(library, name), task, data, results.scale.is_floating_point())
    return ""
