"""The change of a tensor in a quantizer, and the distance of two tensors: sums in float64 that add up over steps."""

import dataclasses
import functools
import math
from typing import Self

import torch
from torch import Tensor

from qcompiler.runtime import scales
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.formats import Format
from qcompiler.runtime.quantized import Quantized
from qcompiler.runtime.spec import QuantSpec


def to_decibels(ratio: float) -> float:
    """10·log10 of a ratio of energies; −inf for 0, inf for inf, NaN for NaN."""
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan


def compute_ratio(part: float, whole: float) -> float:
    """part / whole; 0 for 0/0, inf if only the whole is 0, NaN if either is NaN."""
    if whole == 0:
        return 0.0 if part == 0 else math.nan if math.isnan(part) else math.inf
    return part / whole


@dataclasses.dataclass(frozen=True)
class Span:
    """One step of one quantizer: the span of the tensor, the span of the codes, and the noise."""

    low: float
    high: float
    #: the lowest and the highest value that some block can represent
    range_low: float
    range_high: float
    #: signal-to-quantization-noise ratio, dB
    sqnr: float


@dataclasses.dataclass(frozen=True)
class Tally:
    """The changes x → x̂ of tensors in one quantizer; `a + b` is the tally of both.

    Sums are float64. A NaN or an infinity in x makes `sqnr` NaN and is counted in `not_finite`, in no other count.
    """

    elements: int = 0
    #: Σx², Σ(x − x̂)²
    signal: float = 0.0
    noise: float = 0.0
    #: elements that lie beyond the last level by more than half of the last step, so that not rounding alone moves such
    #: elements
    clipped_count: int = 0
    #: elements with x ≠ 0 and x̂ = 0
    underflowed_count: int = 0
    #: elements with x̂ = 0
    zero_count: int = 0
    not_finite_count: int = 0
    #: binades of the format that some code lies in: exponents of |level| at scale 1
    binades: frozenset[int] = frozenset()
    #: all binades of the format
    all_binades: int = 0
    #: exponents ⌊log2 factor⌋ of all blocks, the lowest and the highest
    lowest_exponent: int | None = None
    highest_exponent: int | None = None
    history: tuple[Span, ...] = ()

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio Σx²/Σ(x − x̂)² in dB; inf if nothing was lost."""
        return -to_decibels(compute_ratio(self.noise, self.signal))

    @property
    def clipped(self) -> float:
        """The fraction of elements that were clipped."""
        return compute_ratio(self.clipped_count, self.elements)

    @property
    def underflowed(self) -> float:
        """The fraction of elements that are not zero and became zero."""
        return compute_ratio(self.underflowed_count, self.elements)

    @property
    def zeros(self) -> float:
        """The fraction of elements that are zero behind the quantizer."""
        return compute_ratio(self.zero_count, self.elements)

    @property
    def not_finite(self) -> float:
        """The fraction of elements that are NaN or infinite."""
        return compute_ratio(self.not_finite_count, self.elements)

    @property
    def exponent_use(self) -> float:
        """The fraction of the format's binades that codes lie in: 1 if small and large levels are all used."""
        return compute_ratio(len(self.binades), self.all_binades)

    def __add__(self, other: Self) -> Self:
        exponents = [e for e in (self.lowest_exponent, other.lowest_exponent) if e is not None]
        tops = [e for e in (self.highest_exponent, other.highest_exponent) if e is not None]
        sums = ("elements", "signal", "noise", "clipped_count", "underflowed_count", "zero_count", "not_finite_count")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name) + getattr(other, name) for name in sums},
            binades=self.binades | other.binades,
            all_binades=max(self.all_binades, other.all_binades),
            lowest_exponent=min(exponents, default=None),
            highest_exponent=max(tops, default=None),
            history=self.history + other.history,
        )


def tally_quantizer(x: Tensor, made: Quantized) -> Tally:
    """Return the figures of one quantizer on one tensor, from the codes and scales.

    Args:
        x: the tensor that was quantized, of the shape of the codes.
        made: the result.
    """
    if x.numel() == 0:
        return Tally()
    codes, zero_point, form = made.codes, made.zero_point, made.spec.format
    view = view_blocks(tuple(x.shape), made.layout, made.spec.block)
    levels = made.dequantize()
    exact, rounded = x.to(torch.float64), levels.to(x.dtype).to(torch.float64)
    finite, gone = torch.isfinite(exact), rounded == 0
    factors = scales.get_factor(made.scale).to(torch.float64)
    zero = 0.0 if zero_point is None else view.spread(zero_point).to(torch.float64)
    place, margin = exact / view.spread(factors) + zero, last_step(form) / 2
    clipped = (place < form.lowest - margin) | (place > form.largest + margin)
    known = factors[torch.isfinite(factors)]
    exponents = torch.frexp(known).exponent - 1
    signal, noise = float(exact.square().sum()), float((exact - rounded).square().sum())
    range_low, range_high = _find_limits(factors, zero_point, form)
    span = Span(
        float(exact.amin()), float(exact.amax()), range_low, range_high, -to_decibels(compute_ratio(noise, signal))
    )
    return Tally(
        elements=x.numel(),
        signal=signal,
        noise=noise,
        clipped_count=int((clipped & finite).sum()),
        underflowed_count=int((gone & finite & (exact != 0)).sum()),
        zero_count=int((gone & finite).sum()),
        not_finite_count=int((~finite).sum()),
        binades=_find_binades(form.decode(codes) - zero),
        all_binades=len(format_binades(form)),
        lowest_exponent=int(exponents.min()) if known.numel() else None,
        highest_exponent=int(exponents.max()) if known.numel() else None,
        history=(span,),
    )


def _find_limits(factors: Tensor, zero_point: Tensor | None, form: Format) -> tuple[float, float]:
    """Return the lowest and the highest value that some block can represent."""
    zero = 0.0 if zero_point is None else zero_point.to(torch.float64)
    return float((factors * (form.lowest - zero)).amin()), float((factors * (form.largest - zero)).amax())


def _find_binades(units: Tensor) -> frozenset[int]:
    """Return the exponents E with 2^E ≤ |u| < 2^(E+1) for some finite u ≠ 0."""
    sizes = units.abs()
    sizes = sizes[(sizes > 0) & torch.isfinite(sizes)]
    return frozenset((torch.frexp(sizes).exponent - 1).unique().tolist())


@functools.cache
def format_binades(form: Format) -> frozenset[int]:
    """Return the exponents of all levels of a format but zero, at scale 1."""
    levels = form.decode(torch.arange(2**form.bits, dtype=torch.int32))
    return _find_binades(levels[levels.abs() <= max(form.largest, -form.lowest)])


@functools.cache
def last_step(form: Format) -> float:
    """Return the distance of the two largest levels of a format, at scale 1."""
    levels = form.decode(torch.arange(2**form.bits, dtype=torch.int32))
    top = levels[levels <= form.largest].unique()[-2:]
    return float(top[1] - top[0])


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The distance of tensors q from references f; `a + b` belongs to both laid end to end. Sums are float64."""

    #: Σ q·f, Σ q², Σ f², Σ (q − f)²
    product: float = 0.0
    own: float = 0.0
    reference: float = 0.0
    difference: float = 0.0

    @property
    def cosine(self) -> float:
        """Σ q·f / √(Σq²·Σf²); 1 if both are zero, 0 if one is, NaN if either is not finite."""
        norms = math.sqrt(self.own) * math.sqrt(self.reference)
        return (1.0 if self.own == self.reference else 0.0) if norms == 0 else self.product / norms

    @property
    def error(self) -> float:
        """Σ(q − f)²/Σf²: 0 if equal, 1 if q is 0; inf if only f is."""
        return compute_ratio(self.difference, self.reference)

    @property
    def error_db(self) -> float:
        """`error` in decibels."""
        return to_decibels(self.error)

    def __add__(self, other: Self) -> Self:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return type(self)(*(a + b for a, b in zip(mine, theirs, strict=True)))


def measure_agreement(own: Tensor, reference: Tensor) -> Agreement:
    """Return the distance of one tensor from a reference of the same shape."""
    q, f = own.to(torch.float64).flatten(), reference.to(torch.float64).flatten()
    sums = torch.stack([q.dot(f), q.dot(q), f.dot(f), (q - f).dot(q - f)])
    return Agreement(*sums.tolist())


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A tensor behind a quantizer, in the dtype of the tensor, and the tally."""

    values: Tensor
    tally: Tally


def simulate_quantizer(x: Tensor, spec: QuantSpec, layout: str) -> Simulated:
    """Return a tensor behind a quantizer, as in the first step of a new site (`Quantized.from_tensor`)."""
    made = Quantized.from_tensor(x, spec, layout)
    return Simulated(made.dequantize(x.dtype), tally_quantizer(x, made))


def quantize_tensor(x: Tensor, spec: QuantSpec, layout: str) -> Tensor:
    """Return the values of `simulate_quantizer`, without the figures."""
    return Quantized.from_tensor(x, spec, layout).dequantize(x.dtype)
