"""Stochastic rounding in compiled code: bit for bit the eager one, also for tensors of a few elements."""

import copy

import pytest
import torch
from torch import nn

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize(("inputs", "outputs", "batch"), [(20, 7, 9), (20, 5, 7)])
def test_small_gradients_with_a_rest_beside_full_vectors(inputs, outputs, batch):
    """63 and 35 elements are 3 and 2 vectors of 16 and a rest; gcc once ended the loop behind the first vector."""
    layer, x, found = nn.Linear(inputs, outputs), torch.randn(batch, inputs, requires_grad=True), []
    for backend in ("eager", "inductor"):
        twin = copy.deepcopy(layer)
        qmodel = qcompiler.compile(twin, "tensor-int8", backend=backend)
        torch.manual_seed(3)
        result = qmodel(x)
        (gradient,) = torch.autograd.grad(result.square().sum(), x, retain_graph=True)
        found.append((gradient, *torch.autograd.grad(result.square().sum(), [twin.weight])))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
