"""`save` beside regions that the user checkpoints: backward computes with the codes of forward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qcompiler


class Residual(nn.Module):
    """A layer in front, checkpointed blocks beside the identity, a head."""

    def __init__(self, blocks, function):
        super().__init__()
        self.front, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.wide = nn.ModuleList(nn.Linear(16, 24) for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Linear(24, 16) for _ in range(blocks))
        self.function = function

    def forward(self, x):
        x = self.front(x)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = checkpoint(self.run_block, x, wide, narrow, use_reentrant=False)
        return self.head(x)

    def run_block(self, x, wide, narrow):
        return x + narrow(self.function(wide(x)))


class Chain(nn.Module):
    """Checkpointed layers beside the identity, and nothing else."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: x + layer(x), x, use_reentrant=False)
        return x


def run_step(model, x, recipe, save, backend="eager"):
    """The output of a step, and the gradient of the weight of the last layer: its codes alone times the tangent."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    qmodel = qcompiler.compile(model, recipe, backend=backend, save=save)
    for _ in range(2):  # ranges in hindsight are compiled from the second step on
        model.zero_grad()
        output = qmodel(x)
        output.square().sum().backward()
    last = [parameter for parameter in model.parameters() if parameter.ndim == 2][-1]
    head = getattr(model, "head", None)
    return output.detach(), (last if head is None else head.weight).grad.clone()


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(12, 16), (4, 3, 16), (2, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("function", [torch.relu, F.gelu, pytest.param(torch.tanh, marks=pytest.mark.full)])
@pytest.mark.parametrize("recipe", ["tensor-int8", "hyperblock-int4", "in-hindsight-w8a8g8"])
def test_codes_of_a_checkpointed_region_are_those_of_forward(shape, blocks, function, recipe, fresh):
    model, x = Residual(blocks, function), torch.randn(shape)
    # 4 bits: more than any recipe's codes have, so that all of them could be shared
    (expected, gradient), (output, saved) = (run_step(model, x, recipe, save) for save in (None, "int4"))
    assert torch.equal(output, expected)
    assert torch.equal(saved, gradient)


@pytest.mark.sample(3)
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("recipe", ["tensor-int8", "current-w8a8g8", "in-hindsight-w8a8g8", "hyperblock-int8-wide"])
@pytest.mark.parametrize("save", ["int8", "int4"])
def test_a_chain_of_checkpoints(layers, recipe, save, fresh):
    model, x = Chain(layers), torch.randn(4, 16)
    (expected, gradient), (output, saved) = (run_step(model, x, recipe, one) for one in (None, save))
    assert torch.equal(output, expected)
    assert torch.equal(saved, gradient)


def test_compiled(fresh):
    model, x = Residual(1, F.gelu), torch.randn(4, 3, 16)
    (expected, gradient), (output, saved) = (
        run_step(model, x, "tensor-int8", save, "inductor") for save in (None, "int8")
    )
    assert torch.equal(output, expected)
    assert torch.equal(saved, gradient)
