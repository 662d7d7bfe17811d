"""Tensors that forward changes in place, or detaches: values, gradients and the tensors themselves are as in eager."""

import copy

import pytest
import torch
from torch import nn

# Dynamo looks at the .grad of its inputs, here tensors between two graphs, and hides the warning, but not from "error"
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def clamp(self, x):
    with torch.no_grad():
        self.first.weight.clamp_(-0.1, 0.1)
        self.second.weight.mul_(0.9)
    return self.second(self.first(x))


def average(self, x):
    with torch.no_grad():
        for new, old in zip(self.first.parameters(), self.second.parameters(), strict=True):
            old.data = 0.9 * old.data + 0.1 * new.data
    return self.first(x) * self.second(x)


def keep_old(self, x):
    old = self.first.weight.data
    self.first.weight.data = self.first.weight.data / 2
    return self.first(x) + x @ old


def tie(self, x):
    self.second.weight.data = self.first.weight.data
    return self.first(x) * self.second(x)


def relu_behind_a_break(self, x):
    x = self.first(x)
    print(end="")
    return self.second(torch.relu_(x))


def write_behind_a_break(self, x):
    cache, y = torch.zeros_like(x), self.first(x)
    print(end="")
    cache[1:] = y[1:]
    print(end="")
    cache[0] += y[2]
    return self.second(cache)


def gradients_inside_of_none(self, x):
    with torch.no_grad(), torch.enable_grad():
        return self.second(self.first(x))


MODELS = [clamp, average, keep_old, tie, relu_behind_a_break, write_behind_a_break, gradients_inside_of_none]


def train(model, call, x, steps=3):
    """All that a training step leaves behind."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        y = call(x)
        y.sin().sum().backward()
        optimizer.step()
        seen += [y, *(p.grad for p in model.parameters()), *(p.detach().clone() for p in model.parameters())]
    return seen


@pytest.mark.parametrize("forward", MODELS, ids=lambda f: f.__name__)
def test_as_in_eager(models, eager, forward):
    model = models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    for expected, found in zip(train(model, model, x), train(twin, eager(twin), x), strict=True):
        assert (expected is None and found is None) or torch.equal(expected, found)


@pytest.mark.parametrize("forward", MODELS, ids=lambda f: f.__name__)
def test_quantized(models, eager, forward):
    """Every layer is quantized, and the loss falls as in float: nothing is lost."""
    model = models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    compiled = eager(model, "hyperblock-int8")
    seen = train(model, compiled, torch.randn(3, 4))
    assert all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in seen)
    layers = {site.name.partition("/")[0].partition("@")[0] for site in compiled.plan().sites}
    assert layers == ({"first", "first#2"} if forward is keep_old else {"first", "second"})


def test_tied_data_stays_tied(models, eager):
    """`a.data = b.data` shares memory from then on, as in eager."""
    model = models.Function(tie, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    eager(model)(torch.randn(3, 4))
    assert model.second.weight.data_ptr() == model.first.weight.data_ptr()


def test_the_norm_of_an_embedding(models, eager):
    model = models.Function(
        lambda self, x: self.head(self.rows(x)), rows=nn.Embedding(6, 4, max_norm=0.5), head=nn.Linear(4, 4)
    )
    twin, x = copy.deepcopy(model), torch.tensor([1, 2, 5])
    for expected, found in zip(train(model, model, x), train(twin, eager(twin), x), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_gets_gradients(models, eager, inside):
    """A tensor of the user without gradients has those of what is written into it, with a break in front or not."""

    def forward(self, x, cache):
        y = self.first(x)
        if inside:
            print(end="")
        cache[1:] = y[1:]
        return self.second(2 * cache)

    model = models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    caches = torch.zeros(3, 4), torch.zeros(3, 4)
    for call, cache in ((model, caches[0]), (eager(twin), caches[1])):
        (call(x, cache).sin().sum() + cache.sum()).backward()
    assert torch.equal(*caches)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_inputs_that_share_memory(models, eager):
    """Dynamo has one graph for all of these; what forward writes into one input shows in the other."""

    def forward(self, a, b):
        a.add_(1)
        return self.layer(a) * b

    model = models.Function(forward, layer=nn.Linear(4, 4))
    compiled = eager(model)
    parts = (
        lambda x: (x[:4], x[2:]),
        lambda x: (x[:4].clone(), x[2:].clone()),
        lambda x: (x[2:], x[:4]),
        lambda x: (x[:4], x[:4]),
        lambda x: (x[:4], x[2:]),
    )
    for part in parts:
        x = torch.randn(6, 4)
        twin = x.clone()
        assert torch.equal(compiled(*part(twin)), model(*part(x)))
        assert torch.equal(twin, x)


def test_a_detached_input_keeps_the_graph_in_front(models, eager):
    """Backward of a critic neither runs nor frees the graph of the generator."""
    generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    critic = eager(models.Function(lambda self, x: self.layer(x.detach()), layer=nn.Linear(6, 1)))
    fake = generator(torch.randn(8, 4))
    critic(fake).sum().backward()
    assert generator[0].weight.grad is None
    fake.sum().backward()
    assert generator[0].weight.grad.count_nonzero()


def test_truncated_backpropagation(models, eager):
    """A state that the model detaches at each step, with one backward a step."""

    def forward(self, x, state):
        return (self.first(x) + self.second(state.detach())).tanh()

    model = models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    twin, xs = copy.deepcopy(model), torch.randn(3, 2, 4)
    for call in (model, eager(twin)):
        state = torch.zeros(2, 4)
        for x in xs:
            state = call(x, state)
            state.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
