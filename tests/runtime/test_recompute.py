"""What backward computes again."""

import pytest
import torch
from torch.nn import functional as F

from qcompiler.runtime import ops, recompute

SHAPES = [(5, 6), (4, 6, 7), (2, 6, 4, 5), (2, 6, 2, 3, 4)]
KINDS = ["batch", "layer", "group"]
EPS = 1e-3


def run_norm(kind, x, weight, bias):
    """(y, mean, rstd) by the kernels of torch, and the sizes."""
    if kind == "batch":
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, EPS), []
    if kind == "layer":
        return torch.native_layer_norm(x, x.shape[1:], weight, bias, EPS), list(x.shape[1:])
    pixels = x[0, 0].numel()
    return torch.native_group_norm(x, weight, bias, len(x), 6, pixels, 3, EPS), [3]


def make_case(kind, shape, affine, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    size = shape[1:] if kind == "layer" else (6,)
    weight, bias = (torch.randn(size, dtype=dtype) for _ in range(2)) if affine else (None, None)
    return x, weight, bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_again_has_the_same_bits(kind, shape, affine, dtype):
    x, weight, bias = make_case(kind, shape, affine, dtype)
    (y, mean, rstd), sizes = run_norm(kind, x, weight, bias)
    again = ops.NORM_AGAIN(x, weight, bias, mean, rstd, kind, sizes, EPS)
    assert torch.equal(again.view(torch.uint8), y.view(torch.uint8))
    assert again.stride() == y.stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_the_expansion_is_the_formula(kind, shape, affine):
    """Four roundings, each by half an ulp of float32, of numbers no larger than the bound."""
    x, weight, bias = make_case(kind, shape, affine, torch.float32)
    (_, mean, rstd), sizes = run_norm(kind, x, weight, bias)
    found = recompute.expand_norm(x, weight, bias, mean, rstd, kind, sizes, EPS)
    (expected, _, _), _ = run_norm(kind, *(None if one is None else one.double() for one in (x, weight, bias)))
    bound = 1 + x.abs().max() + mean.abs().max()
    bound = bound * rstd.max() * (1 if weight is None else weight.abs().max()) + (
        0 if bias is None else bias.abs().max()
    )
    # the statistics have roundings of their own: of a sum of n numbers n · 2^-24 at most
    assert (found.double() - expected).abs().max() <= (4 + 2 * x.numel()) * 2**-24 * bound


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "expected"),
    [
        # one row of values 1 0 3 2: maxima at columns 0 and 2
        ([1, 2], [1, 2], [0, 0], [0, 0]),
        ([1, 2], [1, 2], [0, 1], [1, 1, 0]),  # windows (pad, 1), (0, 3), (2, pad)
        ([1, 4], [1, 1], [0, 0], [2]),
    ],
)
def test_offsets_by_hand(kernel, stride, padding, expected):
    x = torch.tensor([1.0, 0.0, 3.0, 2.0]).reshape(1, 1, 1, 4)
    _, indices = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    offsets = recompute.pool_offsets(indices, [1, 4], kernel, stride, padding)
    assert offsets.flatten().tolist() == expected
    assert torch.equal(recompute.pool_indices(offsets, [1, 4], kernel, stride, padding), indices)


def test_the_largest_offset_fits_a_byte():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 15, 15] = 1
    _, indices = F.max_pool2d(x, 16, return_indices=True)
    offsets = recompute.pool_offsets(indices, [16, 16], [16, 16], [16, 16], [0, 0])
    assert offsets.item() == 255
