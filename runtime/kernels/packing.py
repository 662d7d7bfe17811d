"""Calls of packing.h: codes of 2 to 4 bits, several to a byte, in any order of memory."""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.runtime.kernels.loader import load_library
from qcompiler.runtime.kernels.quantize_blocks import NAME
from qcompiler.runtime.kernels.recorder import call_kernel
from qcompiler.runtime.numbers.packing import packed_dim, per_byte


class _Parts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("outer", "extent", "inner", "parts"))


def explain_packing(shape: Sequence[int], bits: int) -> str:
    """Say why the kernel cannot pack codes of a shape; empty: it can."""
    if per_byte(bits) not in (2, 4):
        return f"the kernel packs codes of 2 to 4 bits, got {bits}"
    return "" if packed_dim(tuple(shape), bits) is not None else f"no dimension of {list(shape)} divides evenly"


def pack(codes: Tensor, bits: int, packed: Tensor) -> str:
    """Write the bytes that hold dense codes; return the reason why nothing is done, or an empty string."""
    library = explain_packing(codes.shape, bits) or load_library(NAME)
    if isinstance(library, str):
        return library
    call_kernel(library.pack_codes, _describe(codes, packed, bits), _point_to(codes), _point_to(packed))
    return ""


def unpack(packed: Tensor, bits: int, codes: Tensor) -> str:
    """Write dense codes that bytes hold; return the reason why nothing is done, or an empty string."""
    library = explain_packing(codes.shape, bits) or load_library(NAME)
    if isinstance(library, str):
        return library
    parts, is_signed = _describe(codes, packed, bits), codes.dtype is torch.int8
    call_kernel(library.unpack_codes, parts, is_signed, _point_to(packed), _point_to(codes))
    return ""


def _describe(codes: Tensor, packed: Tensor, bits: int) -> _Parts:
    """Return the packed tensor as three dimensions, of which the middle one is packed."""
    dim = packed_dim(tuple(codes.shape), bits)
    assert dim is not None
    extent, inner = packed.shape[dim], codes.stride(dim)
    outer = math.prod(packed.shape) // max(1, extent * inner)
    return _Parts(outer, extent, inner, per_byte(bits))


def _point_to(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
