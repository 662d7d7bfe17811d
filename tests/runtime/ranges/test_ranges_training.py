"""Ranges of the past in training: when a state moves, when it does not, and that it survives what models go through.

The sites of a linear layer without bias are known in closed form: its input, its weight, and the gradient of the loss
with respect to its output. `Follower` keeps their moving averages in numpy float32, one backward at a time.
"""

import numpy as np
import pytest
import torch
from past_ranges import F32, SPEC, Follower, backward, data, recipe, top
from torch import nn

pytestmark = pytest.mark.usefixtures("fresh")


def test_a_step_moves_every_state_by_its_formula(linear):
    model, follower = linear(), Follower()
    for x, g in data(6):
        backward(model, x, g)
        follower.see(input=x, weight=model.weight, grad=g)
        assert follower.agrees(model)
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad


def test_each_micro_batch_of_an_accumulation_counts_once(linear):
    model, follower = linear(), Follower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        for x, g in data(3):
            backward(model, x, g)
            follower.see(input=x, weight=model.weight, grad=g)
            assert follower.agrees(model)
        optimizer.step()
        optimizer.zero_grad()


def test_the_range_in_use_is_that_of_the_past(linear):
    """The second input is ten times larger: it is quantized by the range of the first, and clipped there."""
    model = linear("int8:real:tensor:nearest:pass:hindsight(0.75,1)")
    x, g = data(1)[0]
    backward(model, x, g)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4)[:3])
    seen = model(10 * x).detach()
    step = top(x) / F32(127)
    codes = np.rint((10 * x[:, :3]).numpy() / step).clip(-127, 127)
    # the weight is quantized by the range of the random weight before, which clips its ones to the end of that range
    one = model.ranges()["(root)/weight"][1].item()
    np.testing.assert_allclose(seen.numpy(), codes * step * one, rtol=2.0**-21, atol=0)


def test_a_forward_without_backward_changes_nothing(linear):
    model, follower = linear(), Follower()
    (x, g), (y, _) = data(2)
    model(y)
    assert model.ranges() == {}
    backward(model, x, g)
    follower.see(input=x, weight=model.weight, grad=g)
    for _ in range(3):
        model(100 * y)
        with torch.no_grad():
            model(100 * y)
    assert follower.agrees(model)


def test_two_forwards_before_one_backward_are_merged_by_the_wider(linear):
    model, follower = linear(), Follower()
    (x, g), (y, h), (z, k) = data(3)
    backward(model, x, g)
    follower.see(input=x, weight=model.weight, grad=g)
    ((model(y) * h).sum() + (model(z) * k).sum()).backward()
    wider = [max(pair, key=top) for pair in ((y, z), (h, k))]
    follower.see(input=wider[0], weight=model.weight, grad=wider[1])
    assert follower.agrees(model)


def test_two_forwards_before_two_backwards(linear):
    """Both have read one state: the second to commit is merged with the first; gradients follow one another."""
    model, follower = linear(), Follower()
    (x, g), (y, h), (z, k) = data(3)
    backward(model, x, g)
    follower.see(input=x, weight=model.weight, grad=g)
    one, two = (model(y) * h).sum(), (model(z) * k).sum()
    one.backward()
    two.backward()
    follower.see(grad=h)
    follower.see(input=max(y, z, key=top), weight=model.weight, grad=k)
    assert follower.agrees(model)


def test_backward_twice_through_one_graph(linear):
    """What forward has seen counts once; the gradient is seen twice."""
    model, follower = linear(), Follower()
    for x, g in data(2):
        y = model(x)
        y.backward(g, retain_graph=True)
        follower.see(input=x, weight=model.weight, grad=g)
        once = model.weight.grad.clone()
        y.backward(g)
        follower.see(grad=g)
        assert follower.agrees(model)
        assert once.any()
        model.zero_grad()


def test_a_failed_backward_leaves_the_state(linear):
    model, follower = linear(), Follower()
    (x, g), (y, h) = data(2)
    backward(model, x, g)
    follower.see(input=x, weight=model.weight, grad=g)

    def refuse(grad):
        raise RuntimeError("stop")

    given = (50 * y).requires_grad_()
    given.register_hook(refuse)
    with pytest.raises(RuntimeError, match="stop"):
        backward(model, given, 50 * h)
    assert follower.agrees(model)
    backward(model, y, h)
    follower.see(input=y, weight=model.weight, grad=h)
    assert follower.agrees(model)


def test_eval_reads_the_states_and_moves_none(linear):
    """Neither without gradients nor with them."""
    model, follower = linear("int8:real:tensor:nearest:pass:running(0.75)"), Follower()
    x, g = data(1)[0]
    backward(model, x, g)
    before = model.ranges()
    model.eval()
    with torch.no_grad():
        small, large = model(x), model(1e4 * x)
    # with the range of x all of this is clipped
    assert torch.equal(model(1e5 * x), large)
    assert large.abs().max() < 2 * 4 * top(x) * top(model.weight)
    assert not torch.equal(small, large)
    backward(model, 100 * x, 100 * g)
    assert all(torch.equal(state, before[name]) for name, state in model.ranges().items())
    model.train()
    backward(model, x, g)
    assert [*model.ranges()] == [*before]
    follower.see(input=x, weight=model.weight, grad=g)
    follower.see(input=x, weight=model.weight, grad=g)
    assert {name: state[1].item() for name, state in model.ranges().items()} == {
        f"(root)/{name}": high for name, high in follower.high.items()
    }


def test_eval_in_between_changes_nothing(eager):
    def run(evaluate):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = eager(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), recipe())
        for x, g in data(4):
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(100 * x)
                model.train()
            backward(model, x, g)
        return [*model.ranges().values(), *(p.grad for p in model.parameters())]

    assert all(map(torch.equal, run(False), run(True)))


def test_eval_before_any_training_uses_the_ranges_of_its_tensors(linear):
    x = torch.randn(1, 4)  # in eval a range of the present is that of one sample
    past, present = linear("int8:real:tensor:nearest:pass:hindsight"), linear("int8:real:tensor:nearest:pass")
    present.load_state_dict(past.state_dict())
    for model in (past, present):
        model.eval()
    with torch.no_grad():
        assert torch.equal(past(x), present(x))
        assert torch.equal(past(100 * x), present(100 * x))
    assert past.ranges() == {}


class Fork(nn.Module):
    """One input for two layers: one quantizer serves both, and their gradients are one tensor too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_eval_knows_shared_sites_by_their_names_in_training(eager, needs_grad):
    model = eager(Fork(), recipe("int8:real:tensor:nearest:pass:hindsight(0.75,1)"))
    x = 1 + torch.rand(5, 4)
    backward(model, x.clone().requires_grad_(needs_grad), torch.randn(5, 3))
    assert sorted(model.ranges()) == ["a/input", "a/weight", "b/grad", "b/weight"]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(100 * x), model(1000 * x))  # both clipped at the range of x
    sites = {site.name for site in model.plan(training=False).sites}
    assert sites == {"a/input", "a/weight", "b/weight"}


def test_signatures_share_one_state_a_site(linear):
    model, follower = linear(), Follower()
    for i, (x, g) in enumerate(data(6)):
        rows = (5, 2, 3)[i % 3]
        backward(model, x[:rows], g[:rows])
        follower.see(input=x[:rows], weight=model.weight, grad=g[:rows])
        assert follower.agrees(model)


def test_channels_of_a_convolution_share_one_state_over_batch_sizes(eager):
    """A state for each channel lies in the checkpoint as [3, channels], whatever the batch."""
    spec = "int8:real:b*i*s*g*:nearest:pass:hindsight(0.75,1)"
    model = eager(nn.Conv2d(3, 2, 2, groups=1, bias=False), recipe(activation=SPEC, weight=SPEC, gradient=SPEC))
    by_channel = eager(nn.Conv2d(3, 2, 2, bias=False), recipe(weight=spec))
    for net in (model, by_channel):
        for rows in (4, 2):
            net(torch.randn(rows, 3, 4, 4)).square().sum().backward()
    assert by_channel.ranges()["(root)/weight"].shape == (3, 2)
    weight = by_channel.weight.detach().abs().amax((1, 2, 3)).numpy()
    twice = F32(0.75) * (F32(0.75) * weight + F32(0.25) * weight) + F32(0.25) * weight
    np.testing.assert_array_equal(by_channel.ranges()["(root)/weight"][1].flatten().numpy(), twice)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
