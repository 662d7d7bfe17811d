"""Weights in an ONNX file: stored codes, scales beside them, one DequantizeLinear."""

from typing import cast

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.exporting.blocks import spread_scale
from qcompiler.exporting.edits import read_array
from qcompiler.exporting.storage import (
    find_blocked_axis,
    find_simple_axis,
    get_storage_type,
    shape_by_dimension,
    store_codes,
)
from qcompiler.exporting.trace import ExportError
from qcompiler.exporting.writer import StandIn, to_factors
from qcompiler.runtime.numbers.formats import FloatFormat

#: float types that DequantizeLinear of onnxruntime reads
_DEQUANTIZED = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def get_weight_shift(q: StandIn) -> int:
    """Return the number that a file adds to the codes of a weight: 128 makes codes of 8 bits uint8.

    If a CPU has no instruction for sums of 8-bit products (x86 without VNNI), onnxruntime adds two products of uint8
    and int8 in 16 bits, and saturates: sums of large codes are wrong. Products of uint8 and uint8 are added in 32 bits,
    which takes longer. Codes of 7 bits stay int8: 2·255·64 = 32640 is within 16 bits.
    """
    form = q.spec.format
    eight = form.bits == 8 and get_storage_type(form) == ir.DataType.INT8
    return 128 if eight and find_simple_axis(q.edges) is not None and not _is_batched(q) else 0


def write_weight(q: StandIn, shift: int = 0) -> tuple[ir.Value, ir.Value]:
    """Write a frozen weight; return (codes, values).

    1. One scale, or one for each index of an axis: stored as float32; codes and zero point with `shift` added. A zero
       point of 0 is written too: without one onnxruntime 1.31 leaves a Gemm in float.
    2. Blocks: `block_size` along the longest edge; powers of two are stored as int8 exponents, which the graph turns
       into factors and repeats along the other axes.
    3. Float formats without a type, or without a kernel: a table of levels, read by code.
    4. A scale for each matrix of a batched contraction: codes · scales too. onnxruntime takes a DequantizeLinear into
       an integer kernel that has no such scales: it refused files, or computed other numbers.
    """
    form = q.spec.format
    plain = read_array(q.x).reshape([n or 0 for n in q.edges.extents])
    codes = q.constant(
        "codes", ir.Tensor((plain + np.int16(shift)).astype(np.uint8)) if shift else store_codes(plain, form)
    )
    scale = shape_by_dimension(read_array(q.scale), q.edges)
    point = None if q.point is None else shape_by_dimension(read_array(q.point), q.edges)
    if np.isnan(scale.astype(np.float32)).any() or (scale.dtype == np.uint8 and (scale == 255).any()):
        raise ExportError(f"export: {q.site}: the weight holds a NaN or an infinity")
    if _is_batched(q) or (isinstance(form, FloatFormat) and get_storage_type(form) not in _DEQUANTIZED):
        levels = _write_levels(q, codes)
        if point is not None:
            levels = q.op("Sub", levels, q.constant("zero_point", spread_scale(q.edges, point.astype(np.float32))))
        return codes, q.shaped(q.unmerged(q.op("Mul", levels, _spread_in_graph(q, scale, None))))
    axis = find_simple_axis(q.edges)
    if axis is not None:
        inputs = [codes, q.constant("scale", q.along(to_factors(scale), axis))]
        if point is not None:
            inputs.append(q.constant("zero_point", store_codes(q.along(point, axis), form)))
        elif get_storage_type(form) == ir.DataType.INT8:
            inputs.append(q.constant("zero_point", np.full_like(read_array(inputs[1]), shift, read_array(codes).dtype)))
        attributes = {} if axis < 0 else {"axis": axis}
    else:
        axis = find_blocked_axis(q.edges)
        inputs = [codes, _spread_in_graph(q, scale, axis)]
        inputs += (
            []
            if point is None
            else [q.constant("zero_point", store_codes(spread_scale(q.edges, point, (axis,)), form))]
        )
        attributes = {"axis": axis, "block_size": q.edges.edges[axis] or cast(int, q.edges.extents[axis])}
    return codes, q.shaped(q.unmerged(q.op("DequantizeLinear", *inputs, name="", **attributes)))


def _is_batched(q: StandIn) -> bool:
    """Return True for case 4: several scales of a batched contraction."""
    return find_simple_axis(q.edges) != -1 and q.layout[0] == "g"


def _write_levels(q: StandIn, codes: ir.Value) -> ir.Value:
    """Cases 3 and 4: the level of each code, float32."""
    form = q.spec.format
    if not isinstance(form, FloatFormat) or get_storage_type(form).is_floating_point():
        return q.op("Cast", codes, name="Level", to=1)
    values = form.decode(torch.arange(2**form.bits, dtype=torch.int32)).numpy()
    return q.op("Gather", q.constant("levels", values), q.op("Cast", codes, name="Index", to=6))


def _spread_in_graph(q: StandIn, scale: np.ndarray, axis: int | None) -> ir.Value:
    """Case 2: a factor for every block along `axis`, and for every index along all others."""
    if scale.dtype == np.uint8:
        exponents = q.constant("exponents", (scale.astype(np.int16) - 127).astype(np.int8))
        two = q.constant("two", np.array(2, np.float32))
        value = q.op("Pow", two, q.op("Cast", exponents, name="Exponent", to=1))
    else:
        value = q.constant("scale", scale)
    shape = list(scale.shape)
    for dim, (edge, extent) in enumerate(zip(q.edges.edges, q.edges.extents, strict=True)):
        if dim == axis or edge == 1 or extent == 1:
            continue
        assert extent is not None
        length = edge or extent
        wide = [*shape[: dim + 1], length, *shape[dim + 1 :]]
        value = q.op("Unsqueeze", value, q.ints(f"at{dim}", [dim + 1]), name=f"Unsqueeze{dim}")
        value = q.op("Expand", value, q.ints(f"wide{dim}", wide), name=f"Expand{dim}")
        shape[dim] *= length
        value = q.op("Reshape", value, q.ints(f"flat{dim}", shape), name=f"Reshape{dim}")
        if shape[dim] != extent:
            shape[dim] = extent
            value = cut_dimension(q, value, dim, extent)
    return value


def cut_dimension(q: StandIn, value: ir.Value, dim: int, extent: int) -> ir.Value:
    """Return the first `extent` indices of a dimension."""
    bounds = (q.ints(f"{key}{dim}", [n]) for key, n in (("from", 0), ("to", extent), ("along", dim)))
    return q.op("Slice", value, *bounds, name=f"Slice{dim}")
