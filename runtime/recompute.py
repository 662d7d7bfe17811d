"""Operators that backward runs in place of tensors that forward would have to save."""

import math

import torch
from torch import Tensor


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
    """Return the result of a norm, bit for bit, by the kernel of torch: eager.

    Args:
        mean: the statistics that forward saved, as is `rstd`, 1 / √(variance + eps).
        kind: "batch" (in training mode), "layer" or "group".
        sizes: of "layer" the normalized shape, of "group" the number of groups.
    """
    if kind == "batch":
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]
    if kind == "layer":
        return torch.native_layer_norm(x, sizes, weight, bias, eps)[0]
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    return torch.native_group_norm(x, weight, bias, samples, channels, pixels, sizes[0], eps)[0]


def expand_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    sizes: list[int],
    eps: float,
) -> Tensor:
    """Return (x − mean) · rstd · weight + bias, in the order of torch's own decompositions: compiled.

    The statistics are saved ones, so nothing is reduced again.
    """
    if kind == "group":
        return _expand_group_norm(x, weight, bias, mean, rstd, sizes[0])
    if kind == "batch":
        shape = (-1, *[1] * (x.ndim - 2))
        mean, rstd = mean.reshape(shape), rstd.reshape(shape)
        weight = None if weight is None else weight.reshape(shape)
        bias = None if bias is None else bias.reshape(shape)
    result = (x - mean) * rstd
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _expand_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, groups: int
) -> Tensor:
    """Return the group norm: on CPU x·w + b with w = rstd·weight and b = bias − mean·w, one pair a channel."""
    samples, channels = x.shape[:2]
    parts, ones = (samples, groups, channels // groups), [1] * (x.ndim - 2)
    mean, rstd = mean.reshape(samples, groups, 1).expand(parts), rstd.reshape(samples, groups, 1).expand(parts)
    if x.device.type == "cpu" and weight is not None:
        factor = rstd * weight.reshape(1, *parts[1:])
        shift = -mean * factor
        shift = shift if bias is None else shift + bias.reshape(1, *parts[1:])
        return x * factor.reshape(samples, channels, *ones) + shift.reshape(samples, channels, *ones)
    result = (x - mean.reshape(samples, channels, *ones)) * rstd.reshape(samples, channels, *ones)
    result = result if weight is None else result * weight.reshape(1, channels, *ones)
    return result if bias is None else result + bias.reshape(1, channels, *ones)


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
