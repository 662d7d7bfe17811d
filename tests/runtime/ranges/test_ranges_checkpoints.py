"""Ranges of the past under checkpointing, loss scaling and resuming."""

import copy
import io
import logging
import pickle

import pytest
import torch
from past_ranges import NAMES, Follower, backward, data, recipe
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")


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


@pytest.mark.sample(1)
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
