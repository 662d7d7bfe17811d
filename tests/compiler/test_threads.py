"""First steps of several models at once, each in a thread of its own."""

import concurrent.futures
import threading

import pytest
import torch
from torch import nn
from uniform_recipes import uniform

import qcompiler

COUNT = 4

pytestmark = pytest.mark.usefixtures("fresh")


def make(seed):
    """A model with layers that the capture takes apart, and of sizes that no other thread has."""
    torch.manual_seed(seed)
    width = 16 + seed
    model = nn.Sequential(nn.Linear(width, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))
    return qcompiler.compile(model, uniform("int8:fit:tensor:nearest:pass"), backend="eager"), torch.randn(4, width)


def train(qmodel, x, meeting):
    """The gradient of the first weight after each of two steps."""
    meeting.wait()
    found = []
    for _ in range(2):
        qmodel(x).square().sum().backward()
        found.append(qmodel.get_parameter("0.weight").grad.clone())
    return found


def test_first_steps_at_once():
    """Torch keeps the state of a capture for the whole process: captures wait for each other, steps do not."""
    alone, apart = threading.Barrier(1), threading.Barrier(COUNT)
    expected = [train(*make(seed), alone) for seed in range(COUNT)]
    made = [make(seed) for seed in range(COUNT)]
    with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
        found = list(pool.map(lambda one: train(*one, apart), made))
    for own, other in zip(expected, found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))


def test_one_model_in_several_threads():
    """One thread captures; the others wait, and take the same step."""
    qmodel, x = make(0)
    with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
        meeting = threading.Barrier(COUNT)

        def run(_):
            meeting.wait()
            return torch.autograd.grad(qmodel(x).square().sum(), qmodel.get_parameter("0.weight"))[0]

        found = list(pool.map(run, range(COUNT)))
    assert all(torch.equal(found[0], other) for other in found)
    assert len(qmodel.plan().sites) == 6
