"""Calls of quantize_measured.cpp: codes by one known scale, and what the range learns, in one pass through memory."""

import ctypes
import dataclasses
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.quantize_blocks import Call, Results, prepare
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.spec import parse_spec

NAME: Final = "quantize_measured"
#: as in the C++
_KINDS: Final = {Kind.SIGNED: 0, Kind.UNSIGNED: 1, Kind.AFFINE: 2}


class _Data(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "floats", "scale", "zero_point", "key", "reach")),
        *((name, ctypes.c_int64) for name in ("threads", "kind")),
        *((name, ctypes.c_void_p) for name in ("low", "high", "outside", "checked")),
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a tensor shows, each one number: float32, but the scale."""

    #: the ends of the range of the tensor
    low: Tensor
    high: Tensor
    #: the fraction of all elements that the codes do not reach
    outside: Tensor
    #: the scale, NaN (255) if the tensor is not finite
    checked: Tensor


def quantize(
    call: Call, x: Tensor, results: Results, key: Tensor | None, zero: Tensor | None, reach: Tensor, seen: Seen
) -> str:
    """Write codes and floats of a dense float32 tensor with one scale, and what the tensor shows.

    Args:
        reach: float32, the smallest and the largest value that is not clipped.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    prepared = prepare(call, results.scale, NAME, finds_scale=False)
    if isinstance(prepared, str):
        return prepared
    task, library = prepared
    given = {"x": x, "codes": results.codes, "floats": results.floats, "scale": results.scale, "zero_point": zero}
    given |= {"key": key, "reach": reach, **vars(seen)}
    data = _Data(
        threads=torch.get_num_threads(),
        kind=_KINDS[parse_spec(call.spec).format.kind],
        **{name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None},
    )
    library.quantize_measured(ctypes.byref(task), ctypes.byref(data), results.scale.is_floating_point())
    return ""
