"""Both gradients of a convolution in one call."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.call_kernels import CallKernels
from qcompiler.passes.halves.join_gradients import JoinGradients
from qcompiler.passes.ir.views import aten


def leaf():
    return torch.randn(2, 8, 6, 6, requires_grad=True)


def count(halves):
    return len(list(halves.backward.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)))


def test_golden_join_gradients(compiled_halves, settle_compiled, text, golden):
    halves = compiled_halves("hyperblock-int8", nn.Conv2d(8, 4, 3, bias=False), leaf())
    before = text(halves)
    assert settle_compiled(halves, JoinGradients()) == 1
    assert count(halves) == 1
    golden(before=before, after=text(halves))


def test_does_not_fire_on_one_gradient(compiled_halves, text):
    halves = compiled_halves("hyperblock-int8", nn.Conv2d(8, 4, 3), torch.randn(2, 8, 6, 6))
    before = text(halves)
    assert JoinGradients()(halves) == 0
    assert text(halves) == before


def test_does_not_fire_on_gradients_in_different_codes(compiled_halves, text):
    """`channelwise-int8` quantizes the gradient once for either contraction."""
    halves = compiled_halves("channelwise-int8", nn.Conv2d(8, 4, 3, bias=False), leaf())
    before = text(halves)
    assert JoinGradients()(halves) == 0
    assert text(halves) == before


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8", "tensor-int8"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_no_bit_changes(recipe, order, compiled_halves, run_halves, same_bits):
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2, padding=1, bias=False)
    ).to(memory_format=order)
    x = torch.randn(4, 8, 9, 9).contiguous(memory_format=order).requires_grad_()
    halves = [compiled_halves(recipe, model, x) for _ in range(2)]
    if recipe == "hyperblock-int8":
        CallKernels()(halves[1])
    assert JoinGradients()(halves[1]) == 2
    assert same_bits(*map(run_halves, halves))
