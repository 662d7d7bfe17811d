"""Compute every operator in plain torch code: the reference, which is also the decomposition that a compiler fuses.

The eager kernel runs this code, and a compiler traces it. So simulation and compiled code cannot drift apart.
"""

import math

import torch
from torch import Tensor

from qcompiler.runtime import scales
from qcompiler.runtime.numbers import packing
from qcompiler.runtime.numbers.blocks import BlockView, view_blocks
from qcompiler.runtime.numbers.rounding import Rounding, is_finite, random_bits, store_once
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range, keep_finite
from qcompiler.runtime.spec import Ewgs, QuantSpec, parse_spec


def _find_range(
    x: Tensor, s: QuantSpec, view: BlockView, state: Tensor | None, first: bool, frozen: bool
) -> tuple[Observed, Tensor, Ends]:
    """What the range of a tensor is made of: the tensor as estimators see it, the state in use, the ends in use."""
    seen = Observed(x, view, s.format.kind, s.format.magnitude_bits)
    held = None if state is None else s.range.by_axis(state, view.counts)
    held = _fill_state(s.range, seen, held) if first and s.range.has_state else held
    known = seen.x.new_empty(0) if held is None else held
    return seen, known, (s.range.frozen if frozen else s.range.ends)(seen, known)


def _fill_state(estimator: Range, seen: Observed, state: Tensor | None) -> Tensor:
    """The state; the tensor's own if nothing has been seen yet, or if this is a step that seeks it anew."""
    own = estimator.first(seen)
    return own if state is None or estimator.refresh else torch.where(torch.isnan(state), own, state)


def scale(
    x: Tensor, spec: str, layout: str, state: Tensor | None = None, first: bool = True, frozen: bool = False
) -> Tensor:
    """Return the scale of every block of `x`: uint8 exponents + 127 (powers of two) or float32 (`real`).

    Args:
        x: a floating tensor, any shape.
        spec: `str` of a `QuantSpec`.
        layout: a letter for each dimension of `x` (runtime/numbers/blocks.py).
        state: of the range estimator (runtime/ranges/), for those that keep one; None: `x` is the first tensor.
        first: if the state is NaN, `x` gives its own range. False: the state is known to hold one.
        frozen: the range of eval mode, from the state alone.

    Returns:
        One value a block, of the shape `view_blocks(...).counts`. A block with a NaN or an infinity has 255 or NaN.
    """
    s, view = parse_spec(spec), view_blocks(tuple(x.shape), layout, parse_spec(spec).block)
    _, _, ends = _find_range(x, s, view, state, first, frozen)
    return store_once(scales.from_ends(*ends, s))


def zero_point(
    x: Tensor,
    scale: Tensor,
    spec: str,
    layout: str,
    state: Tensor | None = None,
    first: bool = True,
    frozen: bool = False,
) -> Tensor:
    """Return the code of zero of every block: round(−lowest / scale) within the codes; 0 for a NaN block."""
    s = parse_spec(spec)
    _, _, (low, _) = _find_range(x, s, view_blocks(tuple(x.shape), layout, s.block), state, first, frozen)
    return store_once(scales.find_zero_point(low, scale, s))


def _real_codes(x: Tensor, scale: Tensor, s: QuantSpec, view: BlockView) -> Tensor:
    """x / factor before rounding, of the shape of `x`; NaN throughout a NaN block."""
    values = x.to(torch.float32)
    if s.scale.dtype.is_floating_point:
        return values / view.meet(scale)
    # 1 / 2^k is exact, so a power-of-two scale costs a product instead of a division
    return values * view.meet(scales.get_inverse(scale))


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, spec: str, layout: str, site: str
) -> Tensor:
    """Return the codes of `x`, of its shape and strides: `encode` of the format, at x / factor.

    For integers clamp(round(x / factor) + zero point, qmin, qmax), for floats the bits of one of the two levels beside
    x / factor. Rounding comes before saturation. Codes of a NaN block are the zero point, or the float format's NaN.

    Args:
        scale: what `scale` returned.
        zero_point: what `zero_point` returned, for formats that have one.
        key: int32 [2] from `draw_key`, for stochastic rounding.
        site: the name of this quantizer; different sites round with independent bits.
    """
    s = parse_spec(spec)
    view = view_blocks(tuple(x.shape), layout, s.block)
    real = _real_codes(x, scale, s, view)
    noise = None
    if s.rounding is Rounding.STOCHASTIC:
        if key is None:
            raise ValueError(f"quantize: {site}: spec {spec} rounds stochastically and needs a key")
        index = torch.arange(x.numel(), dtype=torch.int32, device=x.device).reshape(x.shape)
        noise = random_bits(key, site, index)
    zero = None if zero_point is None else view.meet(zero_point).to(torch.float32)
    return s.format.encode(real, noise, zero)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    layout: str,
    dtype: torch.dtype,
    x: Tensor | None = None,
) -> Tensor:
    """(`decode` of the code − zero point) · factor in float32, rounded once to `dtype`; NaN throughout a NaN block.

    With `x`, the tensor that was quantized, NaN also if that is not finite: for ranges of the past, which do not
    show it, in one pass over the tensor (`checked` needs a second one).

    The top code of a range that ends beside the largest value of `dtype` can come back as infinity: 60000 in float16
    with `int4:fit` is 4·2¹⁴ = 65536.
    """
    s = parse_spec(spec)
    view = view_blocks(tuple(codes.shape), layout, s.block)
    values = s.format.decode(codes)
    if zero_point is not None:
        values = values - view.meet(zero_point).to(torch.float32)
    values = values * view.meet(scales.get_factor(scale))
    return (values if x is None else torch.where(is_finite(x), values, torch.nan)).to(dtype)


def in_range(x: Tensor, scale: Tensor, spec: str, layout: str, zero_point: Tensor | None = None) -> Tensor:
    """bool: False if x is clipped, x / factor + zero point < lowest or > largest; True throughout a NaN block.

    So a gradient that is NaN comes back as NaN through the clip mask of a NaN block, instead of as zero.
    """
    s = parse_spec(spec)
    view = view_blocks(tuple(x.shape), layout, s.block)
    real = _real_codes(x, scale, s, view)
    if zero_point is not None:
        real = real + view.meet(zero_point).to(torch.float32)
    return ~((real < s.format.lowest) | (real > s.format.largest))


def update(x: Tensor, state: Tensor, spec: str, layout: str, first: bool = False) -> Tensor:
    """The state of the range estimator after `x`; unchanged if that would not be finite (a skipped step of AMP)."""
    s = parse_spec(spec)
    seen, known, _ = _find_range(x, s, view_blocks(tuple(x.shape), layout, s.block), state, first, False)
    after = s.range.update(seen, known).reshape(state.shape)
    return keep_finite(after, state)


def range_gradient(grad: Tensor, x: Tensor, scale: Tensor, spec: str) -> Tensor:
    """The gradient of a learned range (runtime/ranges/learned.py), [width, 1], from that of the dequantized `x`."""
    s = parse_spec(spec)
    step = scales.get_factor(scale).reshape(())
    return s.range.gradient(grad, x, step, s.format.largest, s.format.lowest)


def scale_gradient(grad: Tensor, x: Tensor, scale: Tensor, spec: str) -> Tensor:
    """The gradient of `x` by the rule `Ewgs` of the spec, from that of the dequantized `x`; NaN in a NaN block."""
    s = parse_spec(spec)
    assert isinstance(s.vjp, Ewgs)
    real = x.to(torch.float32) / scales.get_factor(scale).reshape(())
    error = (real - torch.round(real)) / (s.format.largest - s.format.lowest)
    scaled = grad * (1 + s.vjp.delta * torch.sign(grad) * error)
    outside = (real < s.format.lowest) | (real > s.format.largest)
    return torch.where(outside, 0.0, scaled).to(grad.dtype)


def checked(scale: Tensor, x: Tensor, spec: str, layout: str) -> Tensor:
    """Return the scale, NaN (255) for each block of `x` that holds a NaN or an infinity.

    A range of the past does not show them. The scale for dequantizing does, so that loss scaling and anomaly detection
    see the step, and the pass that quantizes need not wait for it.
    """
    s = parse_spec(spec)
    low, high = Observed(x, view_blocks(tuple(x.shape), layout, s.block), s.format.kind, s.format.magnitude_bits).ends
    bad = ~(is_finite(low) & is_finite(high))
    return torch.where(bad, torch.nan if scale.is_floating_point() else scales.NAN_EXPONENT, scale).to(scale.dtype)


def rotate(x: Tensor, dim: int, size: int) -> Tensor:
    """x·R along `dim` in float32, rounded once to the dtype of `x`; R has Hadamard matrices of `size` on its diagonal.

    R = H·D/√size with H the matrix of Sylvester and D signs that depend on `size` alone; R·Rᵀ = 1.
    """
    parts = x.to(torch.float32).unflatten(dim, (-1, size)).movedim(dim + 1, -1)
    turned = torch.matmul(parts, make_rotation(size, x.device))
    return turned.movedim(-1, dim + 1).reshape(x.shape).to(x.dtype).contiguous()


def make_rotation(size: int, device: torch.device) -> Tensor:
    """R: entry (i, j) is sign(j) · (−1)^(bits that i and j share) / √size."""
    index = torch.arange(size, dtype=torch.int32, device=device)
    shared = index.unsqueeze(1) & index
    odd = torch.zeros_like(shared)
    for bit in range(size.bit_length()):
        odd = odd ^ ((shared >> bit) & 1)
    signs = random_bits(torch.zeros(2, dtype=torch.int32, device=device), "rotation", index) >> 31
    return (1 - 2 * odd).to(torch.float32) * (1 + 2 * signs).to(torch.float32) * (1 / math.sqrt(size))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes of at most 4 bits (bool: 1), several to a byte; see runtime/numbers/packing.py."""
    return packing.pack_codes(codes, bits)


def unpack(packed: Tensor, shape: list[int], bits: int, signed: bool) -> Tensor:
    """Return the inverse of `pack`, as int32 or (1 bit) bool."""
    return packing.unpack_codes(packed, tuple(shape), bits, signed)


def lay_out(x: Tensor, stride: list[int]) -> Tensor:
    """Return a copy of `x` with these strides, in which no two elements share memory."""
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def draw_key(device: torch.device) -> Tensor:
    """int32 [2]: the random key of one step, drawn from torch's default generator of the CPU.

    `torch.manual_seed` therefore repeats a run, on every device and in eager and compiled code alike.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32).to(device)
