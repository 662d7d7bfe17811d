"""Biases as integers: a multiple of (scale of the input · scale of the weight), the unit in which products add up."""

from typing import Final

import torch
from torch import Tensor

#: accumulators of integer products have 32 bits
_ENDS: Final = (-(2.0**31), 2.0**31 - 1)


def integer_bias(
    bias: Tensor | None,
    x_scale: Tensor,
    weight_scale: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The bias of a layer, or with `var` the offset β of the batch norm behind, as engines on integers add it.

    A batch norm multiplies by g = γ/√(var + eps) and adds up to b = bias·g + β − mean·g; without one g = 1. An engine
    that computes in integers adds round(b / s), s = x_scale·weight_scale·|g|, to the sums. Returned is
    β + round(b / s)·s − b: this layer, computed in float, adds that to give the same.

    Args:
        bias, gamma, beta, mean, var: floating [C], or None for 0, 1, 0 and no batch norm; bias or mean is given.
        x_scale: float32, one number.
        weight_scale: float32, one number, or one for each of C channels in any shape.

    Returns:
        [C], of the type of `bias` or `mean`, computed in float64. A channel keeps the offset if s is 0 or not finite,
        or if b / s needs more than 32 bits; an offset that is not finite stays so.

    Source: B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018, section 2.4.
    """
    unit = x_scale.double().reshape(()) * weight_scale.double().flatten()
    like = mean if bias is None else bias
    assert like is not None
    whole = torch.zeros_like(like, dtype=torch.float64) if bias is None else bias.double()
    offset = whole
    if var is not None and mean is not None:
        gain, shift = batch_norm_affine(gamma, beta, mean, var, eps)
        unit, whole = unit * gain.abs(), whole * gain + shift
        offset = torch.zeros_like(whole) if beta is None else beta.double()
    count = torch.round(whole / unit)
    fits = (unit > 0) & torch.isfinite(unit) & (count >= _ENDS[0]) & (count <= _ENDS[1])
    return torch.where(fits, offset + (count * unit - whole), offset).to(like.dtype)


def batch_norm_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(gain, offset) of a batch norm in eval mode, float64 [C]: y = gain·x + offset; no gamma is 1, no beta 0."""
    gain = (var.double() + eps).rsqrt() * (1.0 if gamma is None else gamma.double())
    return gain, (0.0 if beta is None else beta.double()) - mean.double() * gain
