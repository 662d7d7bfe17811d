"""Ranges of the past where they were lost: copies that average weights, averaged checkpoints, unused outputs, hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")
HINDSIGHT = "in-hindsight-w8a8g8"


def train(compiled, steps, scale=1.0, after=lambda step: None):
    for step in range(steps):
        compiled(scale * (step + 1) * torch.randn(6, 12)).sin().sum().backward()
        with torch.no_grad():
            for parameter in compiled.parameters():
                parameter.add_(0.1)
        after(step)


def same(one, other):
    return all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


@pytest.mark.parametrize("how", ["averaged model", "data", "in place"])
def test_an_average_of_the_weights_has_the_ranges_of_today(models, eager, how):
    compiled = eager(models.mlp(), HINDSIGHT)
    train(compiled, 2)
    average = AveragedModel(compiled, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if how == "averaged model" else None
    twin = average.module if average is not None else copy.deepcopy(compiled)

    def update(step):
        if average is not None:
            return average.update_parameters(compiled)
        for own, new in zip(twin.parameters(), compiled.parameters(), strict=True):
            with torch.no_grad():
                (own.data if how == "data" else own).mul_(0.5).add_(new.detach(), alpha=0.5)
        return None

    train(compiled, 4, 10, update)
    assert same(twin.ranges(), compiled.ranges())
    twin.eval()(torch.randn(6, 12))
    assert same({k: v for k, v in twin.state_dict().items() if "ranges" in k}, compiled.state_dict())


def test_a_copy_that_stays_as_it_was_keeps_its_ranges(models, eager):
    compiled = eager(models.mlp(), HINDSIGHT)
    train(compiled, 2)
    best, before = copy.deepcopy(compiled), compiled.ranges()
    train(compiled, 3, 10)
    assert same(best.ranges(), before)
    assert not same(compiled.ranges(), before)


def test_a_copy_that_trains_has_ranges_of_its_own(models, eager):
    compiled = eager(models.mlp(), HINDSIGHT)
    train(compiled, 2)
    twin = copy.deepcopy(compiled)
    train(twin, 1)
    own = twin.ranges()
    train(compiled, 2, 10)
    assert same(twin.ranges(), own)


@pytest.mark.parametrize("how", ["mean", "half", "bfloat16"])
def test_checkpoints_that_were_averaged_or_rounded(models, eager, how):
    compiled, states = eager(models.mlp(), HINDSIGHT), []
    train(compiled, 3, after=lambda step: states.append(compiled.state_dict()))
    if how == "mean":
        state = {key: sum(s[key].float() for s in states) / 3 for key in states[0]}
    else:
        state = {key: value.to(getattr(torch, how)) for key, value in states[-1].items()}
    fresh = eager(models.mlp(), HINDSIGHT)
    fresh.load_state_dict(state)
    for name, range_ in fresh.ranges().items():
        key = f"qcompiler.ranges.{name}"
        expected = sum(s[key] for s in states) / 3 if how == "mean" else states[-1][key]
        assert range_.dtype is torch.float32
        assert torch.allclose(range_, expected, rtol=2**-8)  # bfloat16 has 8 bits
    train(fresh, 1)
    assert fresh.ranges().keys() == compiled.ranges().keys()


def test_what_the_loss_does_not_use_is_no_data(models, eager):
    """Twenty steps of another task leave the range of a gradient as it was."""

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return self.one(hidden), self.two(hidden)

    model = models.Function(forward, trunk=nn.Linear(12, 8), one=nn.Linear(8, 2), two=nn.Linear(8, 2))
    compiled, x = eager(model, HINDSIGHT), torch.randn(6, 12)
    sum(y.sin().sum() for y in compiled(x)).backward()
    before = compiled.ranges()
    for _ in range(20):
        compiled(x)[0].sin().sum().backward()
    after = compiled.ranges()
    assert torch.equal(after["two/grad"], before["two/grad"])
    assert after["two/output"][1] == pytest.approx(before["two/output"][1], rel=1e-5)  # forward has seen it


def test_a_plan_of_ranges_without_a_value(eager):
    compiled = eager(nn.Linear(8, 4), HINDSIGHT)
    compiled(torch.full((2, 8), torch.nan)).sum().backward()
    assert "0 steps" not in str(compiled.plan())


def test_hooks_of_checkpoints(eager):
    compiled, called = eager(nn.Linear(2, 2)), []
    compiled.register_state_dict_pre_hook(lambda *_: called.append("before saving"))
    compiled.register_state_dict_post_hook(lambda *_: called.append("after saving"))
    compiled.register_load_state_dict_pre_hook(lambda *_: called.append("before loading"))
    compiled.register_load_state_dict_post_hook(lambda *_: called.append("after loading"))
    compiled.load_state_dict(compiled.state_dict())
    assert called == ["before saving", "after saving", "before loading", "after loading"]


def test_a_hook_that_renames_keys(eager):
    compiled = eager(nn.Linear(2, 2))
    state = {f"old.{key}": value for key, value in compiled.state_dict().items()}

    def rename(module, states, prefix, *_):
        for key in [key for key in states if key.startswith("old.")]:
            states[key.removeprefix("old.")] = states.pop(key)

    compiled.register_load_state_dict_pre_hook(rename)
    assert compiled.load_state_dict(state).missing_keys == []


class Streaming(nn.Module):
    """Calls itself from a generator, a closure and a coroutine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        return self.layer(x)

    def stream(self, xs):
        for x in xs:
            self.calls += 1
            yield self(x)

    def closure(self, x):
        return lambda: self(x)

    async def later(self, x):
        return self.forward(x)

    def twin(self):
        return copy.deepcopy(self)


def test_generators_closures_and_coroutines_are_quantized(eager):
    model, x = Streaming(), torch.randn(4, 8)
    compiled = eager(model, "tensor-int4")
    expected = compiled(x)
    coroutine = compiled.later(x)
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    results = [*compiled.stream([x]), compiled.closure(x)(), ended.value.value]
    assert all(torch.equal(found, expected) for found in results)
    assert not torch.equal(model(x), expected)  # the plain model stays plain
    assert (model.calls, compiled.calls) == (1, 1)
    assert type(compiled.twin()) is Streaming
    assert isinstance(compiled, qcompiler.QuantizedModule)
