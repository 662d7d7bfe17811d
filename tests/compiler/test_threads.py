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


class Waiting(nn.Module):
    """A layer that meets another thread in every forward outside of a capture."""

    def __init__(self, *meetings):
        super().__init__()
        self.layer, self.meetings = nn.Linear(4, 4), meetings

    @torch._dynamo.disable
    def meet(self):
        for meeting in self.meetings:
            meeting.wait(60)

    def forward(self, x):
        """Run the layer, then wait."""
        y = self.layer(x)
        self.meet()
        return y


def test_threads_of_others_are_not_parts_of_a_model():
    """A thread that somebody else starts during the first step multiplies on its own account."""
    begin, end = threading.Barrier(2), threading.Barrier(2)
    qmodel = qcompiler.compile(Waiting(begin, end), uniform("int8:fit:tensor:nearest:pass"), backend="eager")
    step = threading.Thread(target=torch.no_grad()(lambda: qmodel(torch.randn(2, 4))))
    step.start()
    begin.wait(60)
    other = threading.Thread(target=lambda: torch.randn(3, 3) @ torch.randn(3, 3))
    other.start()
    other.join()
    end.wait(60)
    step.join()
    assert qmodel.plan().kept == ()
    assert threading.Thread.start.__name__ == "start"


def test_a_thread_of_a_thread_is_a_part_of_the_model():
    def start(run):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        @torch._dynamo.disable
        def far(self, x):
            found = []
            start(lambda: start(lambda: found.append(self.second(x))))
            return found[0]

        def forward(self, x):
            return self.far(self.first(x))

    qmodel = qcompiler.compile(Nested(), uniform("int8:fit:tensor:nearest:pass"), backend="eager")
    qmodel(torch.randn(2, 4)).sum().backward()
    assert [kept.consumer for kept in qmodel.plan().kept] == ["second"]


def test_a_step_of_another_model_in_a_thread_is_quantized():
    """Its contractions are in the plan of the other model; the outer plan does not call them float."""
    recipe = uniform("int8:fit:tensor:nearest:pass")
    inner = qcompiler.compile(nn.Linear(4, 4), recipe, backend="eager")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @torch._dynamo.disable
        def far(self, x):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                return pool.submit(inner, x.detach()).result()

        def forward(self, x):
            return self.far(self.layer(x))

    x = torch.randn(2, 4)
    inner(x).sum().backward()
    qmodel = qcompiler.compile(Outer(), recipe, backend="eager")
    qmodel(x).sum().backward()
    assert qmodel.plan().kept == ()
