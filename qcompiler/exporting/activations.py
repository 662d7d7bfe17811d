"""Activations in an ONNX file: QuantizeLinear if the range is known, local functions if the range is measured."""

import math
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.exporting.blocks import spread_scale
from qcompiler.exporting.edits import read_array
from qcompiler.exporting.storage import find_simple_axis, get_storage_type, shape_by_dimension
from qcompiler.exporting.trace import ExportError
from qcompiler.exporting.weights import cut_dimension
from qcompiler.exporting.writer import StandIn, to_factors
from qcompiler.runtime.numbers.blocks import WHOLE
from qcompiler.runtime.numbers.formats import FloatFormat, Format, IntFormat, Kind
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.ranges.statistical import Sawb
from qcompiler.runtime.scales import mantissa_of
from qcompiler.runtime.spec import QuantSpec, Scale


def get_activation_shift(q: StandIn) -> int:
    """Return the number that a file adds to codes of a known range: 128 makes int8 uint8.

    onnxruntime does the same to int8 on x86. If the quantizer was moved over a Reshape before, version 1.31 leaves the
    old type in an attribute, and refuses the file.
    """
    one_scale = find_simple_axis(q.edges) == -1
    return 128 if one_scale and get_storage_type(q.spec.format) == ir.DataType.INT8 else 0


def write_static(q: StandIn, shift: int = 0) -> tuple[ir.Value, ir.Value]:
    """Write a known range; return (codes, values).

    1. One scale: QuantizeLinear and DequantizeLinear, cut in front if the codes end before the type does. Codes and
       zero point have `shift` added.
    2. Several scales: the functions of measured ranges. onnxruntime takes a QuantizeLinear along an axis into integer
       kernels that have one scale alone, and then refuses the file.
    3. Floats: a cast, or a function.
    """
    scale, form = to_factors(shape_by_dimension(read_array(q.scale), q.edges)), q.spec.format
    if isinstance(form, FloatFormat):
        # no QuantizeLinear: with 8-bit floats outputs were wrong by half under onnxruntime 1.31's optimizations
        steps = _add_repeated(q, "scale", scale)
        levels = _write_levels(q, form, q.op("Div", q.merged(q.float_input()), steps))
        return levels, _join_blocks(q, q.op("Mul", _cast_levels(q, levels), steps))
    points = np.zeros(scale.shape) if q.point is None else shape_by_dimension(read_array(q.point), q.edges)
    if find_simple_axis(q.edges) != -1:
        parts = _add_repeated(q, "scale", scale), _add_repeated(q, "zero_point", points.astype(np.float32))
        codes = q.op("RangeQuantize", q.merged(q.float_input()), *parts, **_list_ends(form))
        return codes, q.shaped(q.unmerged(q.op("RangeDequantize", codes, *parts)))
    kind = ir.DataType.UINT8 if shift else get_storage_type(form)
    scale, points = scale.reshape(()), points.reshape(())
    parts = (
        q.constant("scale", scale),
        q.constant("zero_point", ir.Tensor((points + shift).astype(kind.numpy()), dtype=kind)),
    )
    codes = q.shaped(q.op("QuantizeLinear", _cut_to_codes(q, form, scale, points), *parts), kind)
    return codes, q.shaped(q.op("DequantizeLinear", codes, *parts))


def _add_repeated(q: StandIn, name: str, numbers: np.ndarray) -> ir.Value:
    """Return one number a block as a constant of the extents of the tensor, or 1 if numbers do not change there."""
    same = [dim for dim, count in enumerate(q.edges.counts) if count is None or count == 1]
    return q.constant(name, spread_scale(q.edges, numbers, same))


def _cut_to_codes(q: StandIn, form: IntFormat, scale: np.ndarray, point: np.ndarray) -> ir.Value:
    """Return the tensor, cut to the values of the first and last code if the type has codes beyond them."""
    x, kind = q.float_input(), get_storage_type(form)
    for name, op_type, end, of_type in (("low", "Max", form.qmin, kind.min), ("high", "Min", form.qmax, kind.max)):
        if end != of_type:
            bound = ((end - point.astype(np.float32)) * scale).astype(np.float32)
            x = q.shaped(q.op(op_type, x, q.constant(name, bound)))
    return x


def write_dynamic(q: StandIn) -> tuple[ir.Value, ir.Value]:
    """Write local functions that measure the tensor block by block; return (codes, values)."""
    spec, form = q.spec, q.spec.format
    _check_range(q)
    x, axes = _split_blocks(q)
    if isinstance(form, IntFormat) and spec.scale.dtype == torch.uint8:
        exponent = q.op("SharedExponent", x, axes, **_list_exponent_rule(spec))
        codes = q.op("HyperblockQuantize", x, exponent, **_list_ends(form))
        return codes, _join_blocks(q, q.op("HyperblockDequantize", codes, exponent))
    if isinstance(form, IntFormat):
        zero = q.constant("zero", np.array(0, np.float32))
        if spec.has_zero_point:
            scale, zero = q.ops("AffineScale", x, axes, outputs=2, largest=form.largest)
        else:
            scale = _write_scale(q, x, axes)
        codes = q.op("RangeQuantize", x, scale, zero, **_list_ends(form))
        return codes, _join_blocks(q, q.op("RangeDequantize", codes, scale, zero))
    if spec.scale.dtype == torch.uint8:
        scale = q.op("ExponentFactor", q.op("SharedExponent", x, axes, **_list_exponent_rule(spec)))
    else:
        scale = _write_scale(q, x, axes)
    levels = _write_levels(q, form, q.op("Div", x, scale))
    return levels, _join_blocks(q, q.op("Mul", _cast_levels(q, levels), scale))


def _check_range(q: StandIn) -> None:
    """Raise for a range of the present tensor of which no function gives the same number as PyTorch."""
    spec, sawb = q.spec, isinstance(q.spec.range, Sawb)
    if not (isinstance(spec.range, Current) or (sawb and spec.scale is Scale.REAL and not q.edges.split)):
        whole = ", or one that takes each sample whole, in integers of scale real" if sawb else ""
        raise ExportError(
            f"export: {q.site}: the range {spec.range} of the present tensor in {spec.block} blocks sums or sorts over "
            f"it, which no two runtimes do in the same order; valid: ranges that are kept, or current{whole}"
        )


def _write_scale(q: StandIn, x: ir.Value, axes: ir.Value) -> ir.Value:
    """Return the float scale of each block, by one level or two."""
    reach, negative = q.spec.format.reach, _get_negative(q.spec.format)
    if isinstance(q.spec.range, Sawb):
        root, mean = q.spec.range.coefficients(q.spec.format.bits)
        return q.op("SawbScale", x, axes, root_factor=root, mean_factor=mean, largest=reach)
    if q.spec.scale is Scale.TWO_LEVEL:
        return q.op("TwoLevelScale", x, axes, reach=reach, negative=negative)
    return q.op("RangeScale", x, axes, largest=reach, negative=negative)


def _cast_levels(q: StandIn, levels: ir.Value) -> ir.Value:
    """Return levels as float32; a function gives float32 already."""
    return levels if levels.dtype is None else q.op("Cast", levels, name="Level", to=1)


def _write_levels(q: StandIn, form: FloatFormat, real: ir.Value) -> ir.Value:
    """Turn real codes into levels: by a cast if ONNX has the type, else by a function."""
    kind = get_storage_type(form)
    if kind.is_floating_point() and kind != ir.DataType.FLOAT16:
        made = q.op("Cast", real, name="Codes", to=kind.value, saturate=int(form.saturates))
        made.type = ir.TensorType(kind)
        return made
    if form.radix != 2 or not form.saturates:
        raise ExportError(f"export: {q.site}: an activation in {form} has no form in ONNX")
    rule = {"mantissa_bits": form.mantissa_bits, "first_exponent": form.first_exponent, "largest": form.largest}
    return q.op("MinifloatRound", real, name="", **rule)


def _split_blocks(q: StandIn) -> tuple[ir.Value, ir.Value]:
    """Return the tensor with one more dimension for each split one, and the dimensions that a block covers."""
    x, pads = q.merged(q.float_input()), [0] * len(q.edges.edges)
    shape: list[int] = []
    axes: list[int] = []
    for dim, (edge, extent) in enumerate(zip(q.edges.edges, q.edges.extents, strict=True)):
        if dim in q.edges.split:
            assert extent is not None
            pads[dim] = -extent % edge
            shape += [-(-extent // edge), edge]
            axes.append(len(shape) - 1)
        else:
            axes += [len(shape)] * (edge == WHOLE)
            shape.append(_get_extent(q, dim))
    if any(pads):
        x = q.op("Pad", x, q.ints("pads", [0] * len(pads) + pads))
    if q.edges.split:
        x = q.op("Reshape", x, q.ints("blocks", shape), name="Split")
    return x, q.ints("axes", axes)


def _get_extent(q: StandIn, dim: int) -> int:
    """Return an extent for Reshape: 0 copies one in front of all splits, −1 finds a single one behind them."""
    extent = q.edges.extents[dim]
    if extent is not None:
        return extent
    first = min(q.edges.split, default=dim)
    free = [d for d, known in enumerate(q.edges.extents) if known is None and d > first]
    if len(free) > 1:
        raise ExportError(
            f"export: {q.site}: several dynamic axes behind one that is cut into blocks; keep all but one of them fixed"
        )
    return -1 if dim in free else 0


def _join_blocks(q: StandIn, values: ir.Value) -> ir.Value:
    """Return values in the shape of the tensor again."""
    if q.edges.split:
        whole = [
            -(-cast(int, extent) // edge) * edge if dim in q.edges.split else _get_extent(q, dim)
            for dim, (edge, extent) in enumerate(zip(q.edges.edges, q.edges.extents, strict=True))
        ]
        values = q.op("Reshape", values, q.ints("whole", whole), name="Join")
        for dim in q.edges.split:
            extent = cast(int, q.edges.extents[dim])
            if extent % q.edges.edges[dim]:
                values = cut_dimension(q, values, dim, extent)
    return q.shaped(q.unmerged(values))


def _get_negative(form: Format) -> float:
    return 0.0 if form.kind is Kind.UNSIGNED else -1.0


def _list_ends(form: IntFormat) -> dict[str, Any]:
    """Return the attributes of a function that makes codes."""
    name = ("" if form.kind is Kind.SIGNED else "U") + ("INT16" if form.bits == 16 else "INT8")
    return {"lowest": form.lowest, "largest": form.largest, "to": ir.DataType[name].value}


def _list_exponent_rule(spec: QuantSpec) -> dict[str, Any]:
    """Return the attributes of SharedExponent for a scale rule."""
    edge = {Scale.FIT: spec.format.reach, Scale.ROUND: math.sqrt(2)}.get(spec.scale, 1.0)
    return {
        "magnitude_bits": spec.format.magnitude_bits,
        "edge": 1 + mantissa_of(edge) / 2**23,
        "above": int(spec.scale is Scale.FIT),
        "below": int(spec.scale in (Scale.CEIL, Scale.ROUND)),
        "negative": _get_negative(spec.format),
    }
