"""Operators that backward runs in place of tensors that forward would have to save."""

import torch
from torch import Tensor


def batch_norm_again(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> Tensor:
    """Return the result of a batch norm in training mode, bit for bit, by the kernel of torch: eager."""
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]


def expand_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> Tensor:
    """(x − mean) · rstd · weight + bias, in the order of torch's own decomposition: compiled.

    The statistics are those that forward saved, so nothing is reduced again.
    """
    shape = (-1, *[1] * (x.ndim - 2))
    result = (x - mean.reshape(shape)) * rstd.reshape(shape)
    result = result if weight is None else result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


def pool_offsets(indices: Tensor, plane: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Return where in its window a max pool found each maximum: row · kernel[1] + column, uint8.

    Args:
        indices: int64 [..., rows, columns], the places in the plane, as aten.max_pool2d_with_indices returns them.
        plane: height and width of the input.
    """
    top, left = _find_corners(indices, stride, padding)
    row, column = indices // plane[1] - top, indices % plane[1] - left
    return (row * kernel[1] + column).to(torch.uint8)


def pool_indices(offsets: Tensor, plane: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Return the inverse of `pool_offsets`, int64."""
    top, left = _find_corners(offsets, stride, padding)
    whole = offsets.to(torch.int64)
    return (whole // kernel[1] + top) * plane[1] + whole % kernel[1] + left


def _find_corners(like: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """Return the first row [rows, 1] and column [columns] of each window; negative inside of the padding."""
    rows, columns = (torch.arange(like.shape[dim], device=like.device) for dim in (-2, -1))
    return (rows * stride[0] - padding[0]).unsqueeze(1), columns * stride[1] - padding[1]
