"""Define the operators that passes write into graphs: schema, reference and shape rule of each.

The references are in runtime/references.py, the shape rules in runtime/shapes.py.

Specs cross as strings: a dataclass in a graph node prints as code that does not run.
"""

from collections.abc import Callable
from typing import Any, Final

import torch

from qcompiler.runtime import coders, recompute, references, shapes, stacked
from qcompiler.runtime.convolutions import (
    convolve_codes,
    convolve_gradient,
    convolve_input,
    fake_convolve_codes,
    fake_convolve_gradient,
    fake_convolve_input,
)
from qcompiler.runtime.kernels import repeat
from qcompiler.runtime.kernels.table import fake_multiply_batch, fake_multiply_runs, multiply_batch, multiply_runs
from qcompiler.runtime.numbers.biases import integer_bias
from qcompiler.runtime.patches import fake_patches, fake_turn_taps, patches, turn_taps
from qcompiler.runtime.products import fake_matmul_codes, fake_multiply_whole, matmul_codes, multiply_whole


def _define_operator(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> torch._ops.OpOverload:
    """Make `reference` the operator `qcompiler::<schema>` on every device, with `fake` as the shape rule."""
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag, *tags])
    name, _, rest = schema.partition("(")
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if name in repeat.NAMES:
        _LIBRARY.define(f"{name}{repeat.SUFFIX}({rest.replace('str ', 'int[] ')}")
        _LIBRARY.impl(f"{name}{repeat.SUFFIX}", repeat.listen(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qcompiler::{name}", fake, lib=_LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.qcompiler, name).default
    return overload


NAMESPACE: Final = "qcompiler"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")
SCALE: Final = _define_operator(
    "scale(Tensor x, str spec, str layout, Tensor? state=None, bool first=True, bool frozen=False) -> Tensor",
    references.scale,
    shapes.scale,
)
ZERO_POINT: Final = _define_operator(
    "zero_point(Tensor x, Tensor scale, str spec, str layout, Tensor? state=None, bool first=True, "
    "bool frozen=False) -> Tensor",
    references.zero_point,
    shapes.zero_point,
)
QUANTIZE: Final = _define_operator(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor? key, str spec, str layout, str site) -> Tensor",
    references.quantize,
    shapes.quantize,
)
DEQUANTIZE: Final = _define_operator(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, str layout, ScalarType dtype, "
    "Tensor? x=None) -> Tensor",
    references.dequantize,
    shapes.dequantize,
)
IN_RANGE: Final = _define_operator(
    "in_range(Tensor x, Tensor scale, str spec, str layout, Tensor? zero_point=None) -> Tensor",
    references.in_range,
    shapes.in_range,
)
UPDATE: Final = _define_operator(
    "update(Tensor x, Tensor state, str spec, str layout, bool first=False) -> Tensor", references.update, shapes.update
)
READ_RANGES: Final = _define_operator(
    "read_ranges(Tensor[] states, str spec, int[] dims=[]) -> Tensor[]", stacked.read_ranges, stacked.fake_read_ranges
)
MEASURE: Final = _define_operator(
    "measure(Tensor x, Tensor reach, str spec, str layout) -> Tensor", stacked.measure, stacked.measure
)
MOVE_RANGES: Final = _define_operator(
    "move_ranges(Tensor[] states, Tensor[] measured, str spec) -> Tensor[]",
    stacked.move_ranges,
    stacked.fake_move_ranges,
)
RANGE_GRADIENT: Final = _define_operator(
    "range_gradient(Tensor grad, Tensor x, Tensor scale, str spec) -> Tensor",
    references.range_gradient,
    shapes.range_gradient,
)
SCALE_GRADIENT: Final = _define_operator(
    "scale_gradient(Tensor grad, Tensor x, Tensor scale, str spec) -> Tensor",
    references.scale_gradient,
    references.scale_gradient,
)
ROTATE: Final = _define_operator("rotate(Tensor x, int dim, int size) -> Tensor", references.rotate, shapes.rotate)
CHECKED: Final = _define_operator(
    "checked(Tensor scale, Tensor x, str spec, str layout) -> Tensor", references.checked, shapes.checked
)
PACK: Final = _define_operator("pack(Tensor codes, int bits) -> Tensor", references.pack, shapes.pack)
UNPACK: Final = _define_operator(
    "unpack(Tensor packed, int[] shape, int bits, bool signed) -> Tensor", references.unpack, references.unpack
)
LAY_OUT: Final = _define_operator("lay_out(Tensor x, int[] stride) -> Tensor", references.lay_out, shapes.lay_out)
INTEGER_BIAS: Final = _define_operator(
    "integer_bias(Tensor? bias, Tensor x_scale, Tensor weight_scale, Tensor? gamma=None, Tensor? beta=None, "
    "Tensor? mean=None, Tensor? var=None, float eps=0.0) -> Tensor",
    integer_bias,
    integer_bias,
)
#: of two tensors of codes
_PRODUCT: Final = (
    "Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, Tensor? bias, "
    "str a_spec, str b_spec, int a_edge, int b_edge, str kernel, ScalarType dtype"
)
MATMUL_CODES: Final = _define_operator(
    f"matmul_codes({_PRODUCT}, int a_run=0, int b_run=0) -> Tensor",
    matmul_codes,
    fake_matmul_codes,
)
MULTIPLY_BATCH: Final = _define_operator(
    "multiply_batch(Tensor a, Tensor b, str kernel) -> Tensor", multiply_batch, fake_multiply_batch
)
MULTIPLY_RUNS: Final = _define_operator(
    "multiply_runs(Tensor a, Tensor a_factors, int a_edge, Tensor b, Tensor b_factors, int b_edge, int run, "
    "str kernel) -> Tensor",
    multiply_runs,
    fake_multiply_runs,
)
MULTIPLY_WHOLE: Final = _define_operator(
    "multiply_whole(Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor b_scale, Tensor? b_zero_point, "
    "Tensor? bias, str a_spec, str b_spec, int a_edge, int b_edge, str kernel) -> Tensor",
    multiply_whole,
    fake_multiply_whole,
    torch.Tag.flexible_layout,
)
#: runtime/patches.py
_WINDOWS: Final = "int[] start, int[] count, int[] step, int[] taps, int[] dilation"
PATCHES: Final = _define_operator(
    f"patches(Tensor codes, Tensor? zero_point, str spec, int edge, {_WINDOWS}) -> Tensor",
    patches,
    fake_patches,
    torch.Tag.flexible_layout,
)
_TAIL: Final = "bool channels_last, int a_run=0, int b_run=0"
CONVOLVE_CODES: Final = _define_operator(
    f"convolve_codes({_PRODUCT}, int[] start, int[] count, int[] step, int[] dilation, {_TAIL}) -> Tensor",
    convolve_codes,
    fake_convolve_codes,
    torch.Tag.flexible_layout,
)
CONVOLVE_INPUT: Final = _define_operator(
    f"convolve_input({_PRODUCT}, int[] stride, int[] padding, int[] dilation, int[] space, {_TAIL}) -> Tensor",
    convolve_input,
    fake_convolve_input,
    torch.Tag.flexible_layout,
)
CONVOLVE_GRADIENT: Final = _define_operator(
    f"convolve_gradient({_PRODUCT}, {_WINDOWS}, {_TAIL}) -> Tensor",
    convolve_gradient,
    fake_convolve_gradient,
    torch.Tag.flexible_layout,
)
TURN_TAPS: Final = _define_operator(
    "turn_taps(Tensor codes, int[] stride) -> Tensor", turn_taps, fake_turn_taps, torch.Tag.flexible_layout
)
QUANTIZE_BLOCKS: Final = _define_operator(
    "quantize_blocks(Tensor x, Tensor? key, str spec, str layout, str site, bool codes, bool floats, int parts=1) "
    "-> Tensor[]",
    coders.quantize_blocks,
    coders.fake_quantize_blocks,
    torch.Tag.flexible_layout,
)
QUANTIZE_BY: Final = _define_operator(
    "quantize_by(Tensor x, Tensor scale, Tensor? zero_point, Tensor? key, str spec, str layout, str site, bool codes, "
    "bool floats, bool shows) -> Tensor[]",
    coders.quantize_by,
    coders.fake_quantize_by,
    torch.Tag.flexible_layout,
)
QUANTIZE_MEASURED: Final = _define_operator(
    "quantize_measured(Tensor x, Tensor scale, Tensor? zero_point, Tensor reach, Tensor? key, str spec, str layout, "
    "str site, bool codes, bool floats, bool shows, bool checks) -> Tensor[]",
    coders.quantize_measured,
    coders.fake_quantize_measured,
    torch.Tag.flexible_layout,
)
DEQUANTIZE_BLOCKS: Final = _define_operator(
    "dequantize_blocks(Tensor codes, Tensor scale, Tensor? zero_point, str spec, str layout, ScalarType dtype, "
    "int[] shape=[]) -> Tensor",
    coders.dequantize_blocks,
    coders.fake_dequantize_blocks,
    torch.Tag.flexible_layout,
)
PACK_CODES: Final = _define_operator(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    coders.pack_codes,
    shapes.pack,
    torch.Tag.flexible_layout,
)
UNPACK_CODES: Final = _define_operator(
    "unpack_codes(Tensor packed, int[] shape, int bits, bool signed) -> Tensor",
    coders.unpack_codes,
    coders.fake_unpack_codes,
    torch.Tag.flexible_layout,
)
DRAW_KEY: Final = _define_operator(
    "draw_key(Device device) -> Tensor", references.draw_key, shapes.draw_key, torch.Tag.nondeterministic_seeded
)

NORM_AGAIN: Final = _define_operator(
    "norm_again(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str kind, int[] sizes, float eps) "
    "-> Tensor",
    recompute.norm_again,
    shapes.norm_again,
)
POOL_OFFSETS: Final = _define_operator(
    "pool_offsets(Tensor indices, int[] plane, int[] kernel, int[] stride, int[] padding) -> Tensor",
    recompute.pool_offsets,
    recompute.pool_offsets,
)
POOL_INDICES: Final = _define_operator(
    "pool_indices(Tensor offsets, int[] plane, int[] kernel, int[] stride, int[] padding) -> Tensor",
    recompute.pool_indices,
    recompute.pool_indices,
)

#: contractions that are computed on codes
PRODUCTS_OF_CODES: Final = frozenset({MATMUL_CODES, CONVOLVE_CODES, CONVOLVE_INPUT, CONVOLVE_GRADIENT})
#: operator → the plain torch code that a compiler traces in its place. These stay calls: `draw_key`, so that it
#: draws anew; `read_ranges` and `move_ranges`, since small tensors take torch no time and a compiler much;
#: `multiply_batch`, `multiply_runs`, `multiply_whole`, and `convolve_codes` and its gradients, which call kernels;
#: `patches` and `turn_taps`, since torch copies runs of bytes and compiled loops copy byte by byte; and what
#: `call-kernels` writes
DECOMPOSITIONS: Final[dict[torch._ops.OpOverload, Callable[..., Any]]] = {
    SCALE: references.scale,
    ZERO_POINT: references.zero_point,
    QUANTIZE: references.quantize,
    DEQUANTIZE: references.dequantize,
    IN_RANGE: references.in_range,
    UPDATE: references.update,
    MEASURE: stacked.measure,
    RANGE_GRADIENT: references.range_gradient,
    SCALE_GRADIENT: references.scale_gradient,
    ROTATE: references.rotate,
    CHECKED: references.checked,
    PACK: references.pack,
    UNPACK: references.unpack,
    LAY_OUT: references.lay_out,
    INTEGER_BIAS: integer_bias,
    MATMUL_CODES: matmul_codes,
    NORM_AGAIN: recompute.expand_norm,
    POOL_OFFSETS: recompute.pool_offsets,
    POOL_INDICES: recompute.pool_indices,
}
