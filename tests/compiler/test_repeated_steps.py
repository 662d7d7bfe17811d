"""Steps whose operators repeat their calls are those of steps in Python, bit for bit."""

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.runtime.kernels import repeat
from qcompiler.runtime.kernels.loader import explain_vectors

pytestmark = pytest.mark.usefixtures("fresh")


def make_images():
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 40, 3, 2), nn.Flatten(1))


def make_lines():
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 40))


def train(make, shape, recipe, *, repeats, sizes=(4,) * 5):
    """Return outputs and gradients of a step for each batch size, and the parameters in the end."""
    torch.manual_seed(0)
    model = qcompiler.compile(make(), recipe, execution="integer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    for size in sizes:
        if not repeats:
            repeat.forget()
        output = model(torch.randn(size, *shape))
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        results += [output.detach(), *(p.grad.clone() for p in model.parameters())]
    return [*results, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.skipif(explain_vectors() != "", reason=explain_vectors())
@pytest.mark.sample(6)
@pytest.mark.parametrize("recipe", ["tensor-int8", "in-hindsight-w8a8g8", "hyperblock-int8-wide"])
@pytest.mark.parametrize(("make", "shape"), [(make_images, (3, 12, 12)), (make_lines, (40,))])
def test_the_same_bits(make, shape, recipe):
    repeat.load()
    expected = train(make, shape, recipe, repeats=False)
    torch._dynamo.reset()
    found = train(make, shape, recipe, repeats=True)
    assert repeat.count_recordings() > 5
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(explain_vectors() != "", reason=explain_vectors())
def test_batches_of_changing_sizes():
    sizes = (4, 4, 4, 7, 4, 7, 7, 1, 4)
    repeat.load()
    expected = train(make_images, (3, 12, 12), "tensor-int8", repeats=False, sizes=sizes)
    torch._dynamo.reset()
    found = train(make_images, (3, 12, 12), "tensor-int8", repeats=True, sizes=sizes)
    assert all(map(torch.equal, found, expected))
