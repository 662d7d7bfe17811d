"""Give shape, dtype and strides of the result of every operator, without a computation: the shape rules.

Each rule has the name and the arguments of its reference in runtime/references.py. Operators without a rule here
(`scale_gradient`, `unpack`, `integer_bias`) run their reference on tensors without data.
"""

import torch
from torch import Tensor

from qcompiler.runtime.numbers import packing
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.spec import parse_spec


def scale(
    x: Tensor, spec: str, layout: str, state: Tensor | None = None, first: bool = True, frozen: bool = False
) -> Tensor:
    """Return one scale for every block."""
    s = parse_spec(spec)
    counts = view_blocks(tuple(x.shape), layout, s.block).counts
    return x.new_empty(counts, dtype=s.scale.dtype)


def zero_point(
    x: Tensor,
    scale: Tensor,
    spec: str,
    layout: str,
    state: Tensor | None = None,
    first: bool = True,
    frozen: bool = False,
) -> Tensor:
    """Return one code for every scale."""
    return torch.empty_like(scale, dtype=parse_spec(spec).format.dtype)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, spec: str, layout: str, site: str
) -> Tensor:
    """Return codes of the shape and strides of `x`."""
    return torch.empty_like(x, dtype=parse_spec(spec).format.dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    layout: str,
    dtype: torch.dtype,
    x: Tensor | None = None,
) -> Tensor:
    """Return values of the shape and strides of the codes."""
    return torch.empty_like(codes, dtype=dtype)


def in_range(x: Tensor, scale: Tensor, spec: str, layout: str, zero_point: Tensor | None = None) -> Tensor:
    """Return one bool for every element."""
    return torch.empty_like(x, dtype=torch.bool)


def update(x: Tensor, state: Tensor, spec: str, layout: str, first: bool = False) -> Tensor:
    """Return a state of the same shape."""
    return torch.empty_like(state)


def range_gradient(grad: Tensor, x: Tensor, scale: Tensor, spec: str) -> Tensor:
    """Return one gradient for every number of the learned range, [width, 1]."""
    return grad.new_empty((parse_spec(spec).range.width, 1), dtype=torch.float32)


def checked(scale: Tensor, x: Tensor, spec: str, layout: str) -> Tensor:
    """Return a scale of the same shape."""
    return torch.empty_like(scale)


def rotate(x: Tensor, dim: int, size: int) -> Tensor:
    """Return a contiguous tensor of the shape of `x`."""
    return x.new_empty(x.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes that hold the codes."""
    parts, dim = packing.per_byte(bits), packing.packed_dim(tuple(codes.shape), bits)
    if dim is None:
        return codes.new_empty(-(-codes.numel() // parts), dtype=torch.uint8)
    return torch.empty_like(codes.narrow(dim, 0, codes.shape[dim] // parts), dtype=torch.uint8)


def lay_out(x: Tensor, stride: list[int]) -> Tensor:
    """Return a tensor with these strides."""
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)


def draw_key(device: torch.device) -> Tensor:
    """Return two int32."""
    return torch.empty(2, dtype=torch.int32, device=device)


def norm_again(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    sizes: list[int],
    eps: float,
) -> Tensor:
    """Return a tensor of the shape of `x`, with the strides of the norm: contiguous ones for layer norm."""
    return x.new_empty(x.shape) if kind == "layer" else torch.empty_like(x)
