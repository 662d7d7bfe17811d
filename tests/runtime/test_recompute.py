"""What backward computes again."""

import pytest
import torch
from torch.nn import functional as F

from qcompiler.runtime import ops, recompute

SHAPES = [(5, 3), (4, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)]


def run_norm(x, weight, bias, eps=1e-5):
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_norm_again_has_the_same_bits(shape, affine, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    weight, bias = (torch.randn(3, dtype=dtype) for _ in range(2)) if affine else (None, None)
    y, mean, rstd = run_norm(x, weight, bias, 1e-3)
    again = ops.BATCH_NORM_AGAIN(x, weight, bias, mean, rstd, 1e-3)
    assert torch.equal(again.view(torch.uint8), y.view(torch.uint8))
    assert again.stride() == y.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_the_expansion_is_the_formula(shape, affine):
    """Four roundings, each by half an ulp of float32, of numbers no larger than the bound."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    weight, bias = (torch.randn(3) for _ in range(2)) if affine else (None, None)
    _, mean, rstd = run_norm(x, weight, bias)
    found = recompute.expand_batch_norm(x, weight, bias, mean, rstd, 1e-5)
    wide = [None if one is None else one.double() for one in (weight, bias)]
    expected = F.batch_norm(x.double(), None, None, *wide, True, 0.1, 1e-5)
    bound = 1 + x.abs().max() + mean.abs().max()
    bound = bound * rstd.max() * (1 if weight is None else weight.abs().max()) + (
        0 if bias is None else bias.abs().max()
    )
    # the statistics have roundings of their own: of a sum of n numbers n · 2^-24 at most
    assert (found.double() - expected).abs().max() <= (4 + 2 * x.numel() / 3) * 2**-24 * bound


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
