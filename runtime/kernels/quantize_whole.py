"""Calls of quantize_whole.cpp: codes and floats of a dense tensor with one scale, which is known or found."""

import ctypes
import dataclasses
from typing import Final

import torch
from torch import Tensor

from qcompiler.runtime.kernels.quantize_blocks import Call, Results, prepare
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.spec import parse_spec

NAME: Final = "quantize_whole"
#: as in the C++
_KINDS: Final = {Kind.SIGNED: 0, Kind.UNSIGNED: 1, Kind.AFFINE: 2}


class _Data(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "floats", "scale", "zero_point", "key")),
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


def quantize(call: Call, x: Tensor, results: Results, key: Tensor | None) -> str:
    """Write the scale, codes and floats of a dense float32 tensor, in two passes.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    return _call_kernel("quantize_whole", call, results, {"x": x, "key": key})


def quantize_measured(
    call: Call, x: Tensor, results: Results, key: Tensor | None, zero: Tensor | None, measured: Measured
) -> str:
    """Write codes and floats of a dense float32 tensor by a scale that is known, and what the range learns.

    Returns:
        The reason why nothing is done; empty: it is.
    """
    given = {"x": x, "key": key, "zero_point": zero, **vars(measured)}
    return _call_kernel("quantize_measured", call, results, given)


def _call_kernel(name: str, call: Call, results: Results, given: dict[str, Tensor | None]) -> str:
    prepared = prepare(call, results.scale, NAME, finds_scale=False)
    if isinstance(prepared, str):
        return prepared
    task, library = prepared
    tensors = {**given, "scale": results.scale, "codes": results.codes, "floats": results.floats}
    data = _Data(
        threads=torch.get_num_threads(),
        kind=_KINDS[parse_spec(call.spec).format.kind],
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    getattr(library, name)(ctypes.byref(task), ctypes.byref(data), results.scale.is_floating_point())
    return ""
