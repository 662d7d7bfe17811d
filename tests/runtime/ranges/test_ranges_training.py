"""Ranges of the past in training: when a state moves, when it does not, and that it survives what models go through.

The sites of a linear layer without bias are known in closed form: its input, its weight, and the gradient of the loss
with respect to its output. `Follower` keeps their moving averages in numpy float32, one backward at a time.
"""

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")

F32 = np.float32
#: the guard of 1 never fires: more than all elements would have to be clipped
SPEC = "int8:fit:tensor:nearest:pass:hindsight(0.75,1)"
NAMES = ("(root)/input", "(root)/weight", "(root)/grad")


def recipe(spec: str = SPEC, **roles: str) -> Recipe:
    named = tuple(Rule(role=Role(role), spec=parse_spec(text)) for role, text in roles.items())
    return Recipe(name="past", rules=(*named, Rule(spec=parse_spec(spec))))


def top(x):
    return F32(x.detach().abs().max().item())


class Follower:
    """The range of each site by its words: at first its own, then 0.75·state + 0.25·(largest magnitude)."""

    def __init__(self):
        self.high = {}

    def see(self, **tensors):
        """One backward."""
        for name, x in tensors.items():
            old = self.high.get(name, top(x))
            self.high[name] = F32(0.75) * old + F32(0.25) * top(x)

    def agrees(self, model):
        ranges = {name.rpartition("/")[2]: state.flatten().tolist() for name, state in model.ranges().items()}
        return ranges == {name: [-high, high, 0.0] for name, high in self.high.items()}


@pytest.fixture
def linear(eager):
    """linear(spec) → a compiled linear layer without bias; its sites are input, weight and grad."""
    return lambda spec=SPEC: eager(nn.Linear(4, 3, bias=False), recipe(spec))


def backward(model, x, g, **options):
    """One backward of Σ y·g, so that g is the gradient of the output."""
    (model(x) * g).sum().backward(**options)


def data(count, rows=5):
    """Inputs and gradients of different sizes, up and down."""
    return [((1 + i % 3) * torch.randn(rows, 4), 2.0 ** (i % 4) * torch.randn(rows, 3)) for i in range(count)]


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


class Regions(nn.Module):
    """The middle of a net inside a checkpointed region, or not."""

    def __init__(self, wanted):
        super().__init__()
        self.net, self.wanted = net(), wanted

    def forward(self, x):
        x = self.net[:2](x)
        return self.net[4](checkpoint(self.net[2:4], x, use_reentrant=False) if self.wanted else self.net[2:4](x))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("how", ["around", "around-reentrant", "inside"])
def test_checkpointing_changes_no_bit(eager, how, rounding):
    def run(wanted):
        torch.manual_seed(0)
        torch._dynamo.reset()
        spec = f"int4:fit:tensor:{rounding}:clip:hindsight(0.75,0.05)"
        model = eager(Regions(wanted and how == "inside"), recipe(spec))
        result = []
        for x, g in data(4):
            x.requires_grad_()
            if wanted and how != "inside":
                y = checkpoint(model, x, use_reentrant=how == "around-reentrant")
            else:
                y = model(x)
            loss = (y * g).sum()
            loss.backward()
            result += [loss.detach(), x.grad, *model.ranges().values()]
        return [*result, *(p.grad for p in model.parameters())]

    plain, recomputed = run(False), run(True)
    assert len(plain) == len(recomputed) >= 4 * 8
    assert all(map(torch.equal, plain, recomputed))


def test_loss_scaling_sees_overflow_and_skips_its_ranges(linear):
    """Infinite gradients come out as NaN or infinity for a scaler to see; what backward has seen is left as it was."""
    model, follower = linear(), Follower()
    (x, g), (y, h) = data(2)
    backward(model, x, g)
    follower.see(input=x, weight=model.weight, grad=g)
    model.zero_grad()
    bad = h.clone()
    bad[1, 2] = torch.inf
    model(y).backward(bad)
    # the weight gradient is summed over the batch: all of feature 2 is lost, as in float, and nothing else
    assert torch.isfinite(model.weight.grad).all(dim=1).tolist() == [True, True, False]
    assert not torch.isfinite(model.weight.grad[2]).any()
    # the range of a gradient stays; forward was finite, and its ranges move
    follower.see(input=y, weight=model.weight)
    assert follower.agrees(model)


def test_a_scaler_skips_the_step(linear):
    model = linear()
    (x, g), _ = data(2)
    backward(model, x, g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer.zero_grad()
    weight = model.weight.detach().clone()
    scaler.scale((model(x) * 4 * g).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, weight)
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize(
    "estimator", ["hindsight(0.75,1)", "running(0.75)", "history", "large", "large(0.1,0.01,0.9)", "cosine"]
)
def test_a_first_step_that_is_not_finite_is_forgotten(linear, estimator):
    """The next one starts anew, with the range of its own tensors."""
    model = linear(f"int8:real:tensor:nearest:pass:{estimator}")
    x, g = data(1)[0]
    model(x).backward(torch.full_like(g, torch.inf))
    model.zero_grad()
    model(torch.full_like(x, torch.nan)).backward(torch.full_like(g, torch.nan))
    model.zero_grad()
    backward(model, x, g)
    fresh = linear(f"int8:real:tensor:nearest:pass:{estimator}")
    fresh.load_state_dict({"weight": model.weight})
    fresh(x).backward(g)
    assert torch.isfinite(model.weight.grad).all()
    assert torch.equal(model.ranges()["(root)/grad"], fresh.ranges()["(root)/grad"])


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "torch.save", "parent"])
def test_ranges_travel_with_the_model(linear, how):
    model = linear()
    first, second = data(2)
    backward(model, *first)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = linear()
        outer = [nn.Sequential(nn.Identity(), m) if how == "parent" else m for m in (model, other)]
        states = outer[0].state_dict()
        prefix = "1." if how == "parent" else ""
        assert {key for key in states if "#" not in key} == {
            f"{prefix}weight", *(f"{prefix}qcompiler.ranges.{name}" for name in NAMES)
        }  # fmt: skip
        assert outer[1].load_state_dict(states) == ([], [])
    kept = {name: state.clone() for name, state in model.ranges().items()}
    assert all(torch.equal(other.ranges()[name], kept[name]) for name in NAMES)
    other.zero_grad()
    model.zero_grad()
    backward(other, *second)
    assert all(torch.equal(model.ranges()[name], kept[name]) for name in NAMES)  # nothing is shared
    assert not any(torch.equal(other.ranges()[name], kept[name]) for name in NAMES[::2])
    backward(model, *second)
    assert all(torch.equal(other.ranges()[name], model.ranges()[name]) for name in NAMES)
    assert torch.equal(other.weight.grad, model.weight.grad)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_plain_checkpoint_loads_strictly_and_says_what_is_missing(linear, caplog):
    model = linear()
    backward(model, *data(1)[0])
    plain = nn.Linear(4, 3, bias=False)
    with caplog.at_level(logging.WARNING, logger="qcompiler"):
        assert model.load_state_dict(plain.state_dict()) == ([], [])
    said = ["the checkpoint holds no ranges of recipe 'past': they start anew"]
    assert warnings(caplog) == said
    assert model.ranges() == {}
    caplog.clear()
    with pytest.raises(RuntimeError, match="Unexpected key"), caplog.at_level(logging.WARNING, logger="qcompiler"):
        model.load_state_dict({**plain.state_dict(), "other": torch.zeros(1)})
    assert not warnings(caplog)  # nothing is said of the ranges of a checkpoint that is refused
    with caplog.at_level(logging.WARNING, logger="qcompiler"):
        nn.Sequential(model).load_state_dict({"0.weight": plain.weight})
    assert warnings(caplog) == said
    # a recipe that keeps no ranges misses none
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="qcompiler"):
        linear("int8:real:tensor:nearest:pass").load_state_dict(plain.state_dict())
    assert not warnings(caplog)


def test_torch_compile_has_no_place_for_ranges(models):
    compiled = torch.compile(models.mlp(), backend="qcompiler", options={"recipe": recipe(), "backend": "eager"})
    with pytest.raises(Exception, match=r"use qcompiler\.compile\(model, recipe\)"):
        compiled(torch.randn(6, 12))


def test_a_resumed_run_equals_one_run(tmp_path, workers):
    """20 steps at once, or 10, a checkpoint, and 10 in a new process: the same bits."""
    straight = {}
    for run in workers.RUNS:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, optimizer = workers.build(*run)
        workers.train(model, optimizer, range(10))
        qcompiler.save(workers.checkpoint(model, optimizer), tmp_path / f"{'.'.join(run)}.pt")
        straight[run] = workers.train(model, optimizer, range(10, 20)), workers.checkpoint(model, optimizer)
    assert workers.start("resume", tmp_path).wait(timeout=300) == 0
    for run, (losses, expected) in straight.items():
        done = torch.load(tmp_path / f"{'.'.join(run)}.done", weights_only=True)
        assert done["losses"] == losses, run
        assert [*done["model"]] == [*expected["model"]]
        assert sum("qcompiler.ranges" in key for key in done["model"]) == 18
        for key, value in expected["model"].items():
            assert torch.equal(done["model"][key], value), (*run, key)
