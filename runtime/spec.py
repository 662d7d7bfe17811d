"""QuantSpec: everything that decides which numbers a quantizer produces, as one value with one canonical string."""

import contextlib
import dataclasses
import enum
import functools
import math
import re
from typing import TypeVar

import torch

from qcompiler.runtime.numbers.blocks import TENSOR, WHOLE, Block, parse_block
from qcompiler.runtime.numbers.formats import FloatFormat, Format, IntFormat, Kind, parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.estimators import parse_range
from qcompiler.runtime.ranges.present import Current

_E = TypeVar("_E", bound=enum.StrEnum)


class Scale(enum.StrEnum):
    """How the scale of a block follows from the largest magnitude (runtime/scales.py, docs/numbers.md).

    Write amax = f·2^E with ½ ≤ f < 1, and m for the magnitude bits of the format: 2^(m−1) ≤ reach < 2^m.
    """

    #: 2^(E−m): the rule of block-floating-point hardware, and of OCP MX, 2^(⌊log2 amax⌋ − emax); saturates
    MAX = "max"
    #: the smallest power of two at which amax does not saturate
    FIT = "fit"
    #: amax / largest value, as float32
    REAL = "real"
    #: integers: 2^(⌈log2 amax⌉ − m), as HBFP does: `max`, but half as much if amax is a power of two; saturates
    CEIL = "ceil"
    #: integers: 2^(round(log2 amax) − m), the shift scale of WAGEUBN; saturates
    ROUND = "round"
    #: 1, whatever the range: formats with an exponent of their own under loss scaling; saturates
    ONE = "one"
    #: e4m3(amax/largest/unit)·unit, unit = amax of the tensor/(largest·448), as NVFP4 does; float32; can saturate
    TWO_LEVEL = "two-level"

    @property
    def dtype(self) -> torch.dtype:
        """Storage of one scale: float32, or uint8 for powers of two."""
        return torch.float32 if self in (Scale.REAL, Scale.TWO_LEVEL) else torch.uint8


class Vjp(enum.StrEnum):
    """The treatment of the gradient that comes back through a quantizer."""

    #: the gradient unchanged (straight-through estimator)
    PASS = "pass"
    #: the gradient if the value lay inside the range, zero if the value was clipped
    CLIP = "clip"


@dataclasses.dataclass(frozen=True)
class Ewgs:
    """Scales the gradient by how far the value was rounded; `str` gives `ewgs(1)`, which `parse_vjp` reads back.

    g·(1 + δ·sign(g)·(x − x̂)/(high − low)), zero if the value was clipped (J. Lee, D. Kim, B. Ham: Network
    Quantization with Element-wise Gradient Scaling, CVPR 2021, §3; there δ follows the Hessian).

    Raises:
        ValueError: δ is negative or not finite.
    """

    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"vjp: ewgs: delta: got {self.delta:g}; valid: a number from 0")

    def __str__(self) -> str:
        return f"ewgs({self.delta:g})" if float(f"{self.delta:g}") == self.delta else f"ewgs({self.delta!r})"


def parse_vjp(text: str) -> Vjp | Ewgs:
    """Return the rule that `str` wrote: `pass`, `clip`, `ewgs(1)`.

    Raises:
        ValueError: another text.
    """
    if match := re.fullmatch(r"ewgs\(([\d.e+-]+)\)", text):
        with contextlib.suppress(ValueError):
            return Ewgs(float(match[1]))
    if text in tuple(Vjp):
        return Vjp(text)
    raise ValueError(f"vjp: got {text!r}; valid: {', '.join(Vjp)}, or ewgs with a number from 0, such as ewgs(1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized. `parse_spec(str(spec)) == spec`; the string stands in the graph.

    Raises:
        ValueError: a zero point together with a power-of-two scale (rounding the zero point would push the end of the
            range over the last code, so the exponent could not be chosen from the range alone); a scale rule of
            integers with a float format; a learned range with other than one real scale a tensor of integers; `Ewgs`
            with other than one scale a tensor of integers, rounded to nearest.
    """

    #: the levels
    format: Format
    #: scale rule; power-of-two scales are stored as an 8-bit exponent, others as float32
    scale: Scale = Scale.FIT
    #: the elements that share a scale
    block: Block = dataclasses.field(default_factory=Block)
    #: real code → integer code
    rounding: Rounding = Rounding.NEAREST
    #: gradient through this quantizer
    vjp: Vjp | Ewgs = Vjp.PASS
    #: the source of the ends of the range
    range: Range = dataclasses.field(default_factory=Current)

    def __post_init__(self) -> None:
        if self.has_zero_point and self.scale is not Scale.REAL:
            raise ValueError(f"spec: {self.format} has a zero point and needs scale 'real', got {str(self.scale)!r}")
        if isinstance(self.format, FloatFormat) and self.scale in (Scale.CEIL, Scale.ROUND):
            valid = ", ".join(rule for rule in Scale if rule not in (Scale.CEIL, Scale.ROUND))
            raise ValueError(f"spec: scale {str(self.scale)!r} is for integers, got {self.format}; valid: {valid}")
        self.range.check_bits(self.format.bits)
        plain = isinstance(self.format, IntFormat) and not self.has_zero_point
        if self.range.is_learned and not (plain and self.scale is Scale.REAL and self.block == TENSOR):
            raise ValueError(
                f"spec: the learned range {self.range} is one number for a tensor of integers; it needs block "
                f"'tensor', scale 'real' and format int or uint, got {self.block}, {self.scale}, {self.format}"
            )
        if isinstance(self.vjp, Ewgs) and not (plain and self.block == TENSOR and self.rounding is Rounding.NEAREST):
            raise ValueError(
                f"spec: vjp {self.vjp} measures the distance to the nearest integer; it needs block 'tensor', rounding "
                f"'nearest' and format int or uint, got {self.block}, {self.rounding}, {self.format}"
            )

    @property
    def has_zero_point(self) -> bool:
        """True if zero has a code that depends on the range."""
        return self.format.kind is Kind.AFFINE

    @property
    def saturates(self) -> bool:
        """True if values can fall outside the range, so that `Vjp.CLIP` differs from `Vjp.PASS`."""
        clips = self.scale not in (Scale.FIT, Scale.REAL) or self.format.kind is Kind.UNSIGNED
        return clips or self.range != Current()

    @property
    def has_known_scale(self) -> bool:
        """True if the scale does not depend on the tensor in front, in eval mode at least."""
        return self.range.is_static or self.range.has_state or self.scale is Scale.ONE

    @property
    def outlives_batch(self) -> bool:
        """False if a range is to be kept for blocks that the next batch does not have: blocks of samples or pixels.

        Weights are the same tensor in every step: any block will do.
        """
        kept = self.range.has_state and self.range.by_block
        return not kept or (self.block.batch, self.block.space, self.block.group) == (WHOLE, WHOLE, WHOLE)

    def with_block(self, block: Block) -> "QuantSpec":
        """Return the same spec over another block."""
        return dataclasses.replace(self, block=block)

    def __str__(self) -> str:
        text = f"{self.format}:{self.scale}:{self.block}:{self.rounding}:{self.vjp}"
        return text if self.range == Current() else f"{text}:{self.range}"


@functools.cache
def parse_spec(text: str) -> QuantSpec:
    """The spec that `str` wrote, such as `int8:fit:b4c16:nearest:pass` or `int8:real:tensor:nearest:pass:hindsight`.

    Raises:
        ValueError: not five or six fields, or one field is not valid.
    """
    fields = text.split(":")
    if len(fields) not in (5, 6):
        raise ValueError(
            f"spec: got {text!r}; valid: format:scale:block:rounding:vjp and a range, or none for the tensor's own, "
            "such as int8:fit:b4c16:nearest:pass"
        )
    return QuantSpec(
        format=parse_format(fields[0]),
        scale=parse_choice(Scale, fields[1], "scale"),
        block=parse_block(fields[2]),
        rounding=parse_choice(Rounding, fields[3], "rounding"),
        vjp=parse_vjp(fields[4]),
        range=parse_range(fields[5]) if len(fields) == 6 else Current(),
    )


def parse_choice(kind: type[_E], text: str, field: str) -> _E:
    """Return the member of an enumeration, or a ValueError that names the field and the valid members."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{field}: got {text!r}; valid: {', '.join(kind)}") from None
