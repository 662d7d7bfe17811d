"""How codes and scales lie in an ONNX file: types, axes and block sizes. Arrays in, arrays out; no graph."""

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.exporting.blocks import Edges
from qcompiler.runtime.numbers.blocks import WHOLE
from qcompiler.runtime.numbers.formats import FloatFormat, Format, Kind

#: float formats that ONNX has as types; others are stored as their bits
_FLOATS = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2, "e5m10": ir.DataType.FLOAT16}


def get_storage_type(form: Format) -> ir.DataType:
    """Return the narrowest ONNX type of opset 21 that holds every code: 4, 8 or 16 bits, or a float type."""
    if isinstance(form, FloatFormat):
        own = _FLOATS.get(str(form).removesuffix(form.top.value)) if form.bias is None else None
        return own or (ir.DataType.UINT4 if form.bits <= 4 else ir.DataType.UINT8)
    width = 4 if form.bits <= 4 else form.bits if form.bits == 16 else 8
    sign = "" if form.kind is Kind.SIGNED else "U"
    return ir.DataType[f"{sign}INT{width}"]


def store_codes(codes: np.ndarray, form: Format) -> ir.Tensor:
    """Return codes as a tensor of `get_storage_type`."""
    kind = get_storage_type(form)
    if kind.is_floating_point():
        codes = np.ascontiguousarray(codes).view(kind.numpy())
    return ir.Tensor(np.ascontiguousarray(codes), dtype=kind)


def shape_by_dimension(scale: Any, edges: Edges) -> np.ndarray:
    """Return a scale of one number a block, dimension by dimension instead of axis by axis."""
    return np.asarray(scale).reshape([count or 1 for count in edges.counts])


def find_simple_axis(edges: Edges) -> int | None:
    """Return the one dimension along which the scale changes; −1 for one number, None for several dimensions."""
    changing = [dim for dim, count in enumerate(edges.counts) if count != 1]
    return None if len(changing) > 1 else changing[0] if changing else -1


def find_blocked_axis(edges: Edges) -> int:
    """Return the dimension that `block_size` runs along: the one of the longest edge, so that least is repeated."""
    lengths = [extent if edge == WHOLE else edge for edge, extent in zip(edges.edges, edges.extents, strict=True)]
    return max(range(len(lengths)), key=lambda dim: lengths[dim] or 1)
