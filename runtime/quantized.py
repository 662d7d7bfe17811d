"""A quantized tensor as one value: codes with everything that turns codes back into floats."""

import dataclasses

import torch
from torch import Tensor

from qcompiler.runtime import references
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Codes, scale and zero point of one tensor, by one spec and layout.

    Always holds (`explain_mismatch` is empty): the codes have the type of the format; the scale has one value a block,
    of the type of the scale rule; there is a zero point, as many as scales, exactly if the format has one.

    Raises:
        ValueError: the parts do not belong together; the message names the given and the valid parts.
    """

    #: of the shape of the tensor
    codes: Tensor
    #: [blocks along each axis], exponents + 127 as uint8, or float32
    scale: Tensor
    #: of the shape of the scale, in the type of the codes; None for formats without one
    zero_point: Tensor | None
    spec: QuantSpec
    #: a letter for each dimension (runtime/numbers/blocks.py)
    layout: str

    def __post_init__(self) -> None:
        complaint = explain_mismatch(self.codes, self.scale, self.zero_point, self.spec, self.layout)
        if complaint:
            raise ValueError(f"quantized tensor: {complaint}")

    @classmethod
    def from_tensor(cls, x: Tensor, spec: QuantSpec, layout: str) -> "Quantized":
        """Return `x` quantized as in the first step of a new site: ranges of the past start from `x` itself.

        Stochastic rounding draws the same bits at every call, and nothing from torch's generator.
        """
        text = str(spec)
        scale = references.scale(x, text, layout)
        point = references.zero_point(x, scale, text, layout) if spec.has_zero_point else None
        stochastic = spec.rounding is Rounding.STOCHASTIC
        key = torch.zeros(2, dtype=torch.int32, device=x.device) if stochastic else None
        return cls(references.quantize(x, scale, point, key, text, layout, "what-if"), scale, point, spec, layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of the codes, rounded once to `dtype`; NaN throughout a NaN block."""
        return references.dequantize(self.codes, self.scale, self.zero_point, str(self.spec), self.layout, dtype)


def explain_mismatch(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, layout: str) -> str:
    """Return why parts do not make one quantized tensor; empty if all fit. Fake tensors will do."""
    if codes.dtype is not spec.format.dtype:
        return f"codes are {codes.dtype}; valid: {spec.format.dtype}"
    complaint = explain_scale(tuple(codes.shape), scale, spec, layout)
    if complaint:
        return complaint
    if spec.has_zero_point != (zero_point is not None):
        return f"spec {spec} {'needs a' if spec.has_zero_point else 'has no'} zero point"
    if zero_point is not None and (zero_point.shape, zero_point.dtype) != (scale.shape, codes.dtype):
        found = f"{zero_point.dtype} {list(zero_point.shape)}"
        return f"zero point is {found}; valid: {codes.dtype} {list(scale.shape)}"
    return ""


def explain_scale(shape: tuple[int, ...], scale: Tensor, spec: QuantSpec, layout: str) -> str:
    """Return why a scale does not fit a tensor of a shape; empty if the scale fits."""
    counts, kind = view_blocks(shape, layout, spec.block).counts, spec.scale.dtype
    if tuple(scale.shape) != counts or scale.dtype is not kind:
        return f"scale is {scale.dtype} {list(scale.shape)}; valid: {kind} {list(counts)}"
    return ""
